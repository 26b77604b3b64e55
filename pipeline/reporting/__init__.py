"""What a run says: metrics, progress, logs, summaries."""
