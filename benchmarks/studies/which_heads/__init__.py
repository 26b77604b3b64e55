"""How many heads pay, and of which kind (Gloeckle et al. 2024, section 3 and appendix B)."""
