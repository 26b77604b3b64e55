"""Several tokens are chosen at once, by their joint probability: exactly, or from drafts (lossy)."""
