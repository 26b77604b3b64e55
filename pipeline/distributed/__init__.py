"""Ranks: how they meet, where each one stands, what they agree on, who is gone."""
