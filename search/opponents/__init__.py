"""Opponents of the gradient search: other ways to a profile of the same cost, with the same budget of compute."""
