"""Arithmetic of polynomials in F_7[X]/(X^5) (Gloeckle et al. 2024, section 4.2, figure 8)."""
