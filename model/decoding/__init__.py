"""Decoding with the heads, and its cache."""
