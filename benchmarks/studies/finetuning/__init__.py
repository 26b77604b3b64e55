"""Finetuning of models of several heads (Gloeckle et al. 2024, section 3.6, figure 4)."""
