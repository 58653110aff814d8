"""Searches against their opponents: the same compute, the same costs, the same test, several seeds."""
