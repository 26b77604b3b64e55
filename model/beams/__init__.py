"""Texts of several beams at once: beam search, and beam sampling by one model or by two."""
