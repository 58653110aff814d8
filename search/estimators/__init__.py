"""How the loss learns what the number of kept tokens does to it: one method a file, its dataclass is its config."""
