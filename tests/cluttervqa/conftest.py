"""Settings of the benchmark's tests: no deadlines, for machines differ."""

from hypothesis import settings

settings.register_profile("cluttervqa", deadline=None, print_blob=True)
settings.load_profile("cluttervqa")
