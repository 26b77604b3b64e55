"""An HTTP server over a running batch, in the form of OpenAI's API."""
