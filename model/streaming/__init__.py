"""Texts of any length from a model with a memory, and what it knows of them in a file."""
