"""Figures of the paper from raw results, runs and profiles; each PNG has the data behind it as JSON beside it."""
