"""The page about a running server, and what it shows."""
