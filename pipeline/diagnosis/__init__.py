"""Whether a cluster is fit for a run: checks by all ranks together, which leave nothing behind."""
