"""Corpora: files of every kind, cut into units and read as records."""
