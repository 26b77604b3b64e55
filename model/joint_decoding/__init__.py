"""Several tokens at once, by their joint probability: exactly, or from drafts, which is lossy."""
