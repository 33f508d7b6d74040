"""The OpenAI-compatible API over HTTP, and a page."""
