"""Ranks: how they meet, where each one is, what they agree on, who is gone."""
