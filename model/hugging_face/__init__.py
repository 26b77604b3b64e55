"""The Hugging Face form of a model: names, configuration, reading; the class with all heads."""
