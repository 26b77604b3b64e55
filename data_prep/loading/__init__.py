"""Batches out of shard sets; order is a pure function, position is one integer."""
