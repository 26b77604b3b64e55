"""Records that are not one text: prompts with completions, and chats; what of them is a target."""
