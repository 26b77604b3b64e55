"""Ways of decoding: drafts of the heads, which of them are kept, and when texts end."""
