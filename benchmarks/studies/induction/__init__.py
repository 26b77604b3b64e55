"""Induction on stories with names of two tokens (Gloeckle et al. 2024, section 4.1, figure 7)."""
