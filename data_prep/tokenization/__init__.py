"""Tokenizers, and the fastest encoder that gives the same ids."""
