"""One optimizer step on DeepSpeed, and everything that touches DeepSpeed."""
