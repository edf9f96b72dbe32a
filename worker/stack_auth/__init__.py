"""The users API: an HTTP client, and the reading of its answers."""
