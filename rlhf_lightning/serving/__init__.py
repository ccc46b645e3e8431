"""An HTTP server with OpenAI's API for a policy."""
