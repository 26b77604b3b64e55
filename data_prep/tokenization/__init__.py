"""Tokenizers, and the fastest encoder that proves equal to them."""
