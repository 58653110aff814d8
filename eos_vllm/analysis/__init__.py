"""What can be said of a profile without running it: cost, comparison with stock, KV groups, scaling, equivalence.

Nothing here is on the way of a request.
"""
