"""The hierarchical memory: a stream read segment by segment, with what came before it."""
