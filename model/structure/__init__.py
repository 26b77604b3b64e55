"""What a model consists of, by its sizes alone: parameters, who holds and trains them."""
