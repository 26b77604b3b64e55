"""Learn, focus, review against random order (Prakriya et al. 2024), at equal tokens and steps."""
