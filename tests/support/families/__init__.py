"""Tiny models of every family, and a reference that reduces them in Hugging Face's own code."""
