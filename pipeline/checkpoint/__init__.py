"""Checkpoints: what is in them, and how they are written, found and kept."""
