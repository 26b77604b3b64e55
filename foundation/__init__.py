"""What data_prep, model and pipeline stand on; it imports nothing of theirs."""
