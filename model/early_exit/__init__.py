"""Drafts from the model's own lower layers: an adapter leaves it early, all layers verify."""
