"""What a run needs of a cluster before it starts there: memory, traffic, time; and what fits."""
