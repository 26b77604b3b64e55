"""How what writes text reads what it is asked for: options, prompts, decoders; and tells of it."""
