"""Corpora to Arrow shards, and shards to training batches."""
