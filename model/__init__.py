"""The multi-token prediction model: trunk, heads, losses, decoding."""
