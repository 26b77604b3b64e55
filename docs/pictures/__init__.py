"""Pictures of the documentation, each drawn by a script of its own."""
