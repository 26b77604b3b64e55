"""How the command that writes text reads its options and prompts, and tells of its runs."""
