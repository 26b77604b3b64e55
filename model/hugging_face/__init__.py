"""The Hugging Face form of a model: names, files, configuration, the class with all heads."""
