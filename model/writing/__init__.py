"""How the command that writes text reads its prompts and tells of its runs."""
