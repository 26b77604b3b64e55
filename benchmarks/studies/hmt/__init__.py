"""A memory of earlier segments (He et al. 2024), against windows and the memory of one segment."""
