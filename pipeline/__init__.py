"""Training runs: configuration, engine, loop, checkpoints, export."""
