"""From a checkpoint to a Hugging Face folder, and the checks of it."""
