"""What holds for all tests: the same examples in every run, and no clock in the laws."""

from __future__ import annotations

from hypothesis import settings

# Deterministic, so that a red run is red for everybody; to search further, run
# pytest --hypothesis-profile=explore.
settings.register_profile("house", deadline=None, derandomize=True, database=None)
settings.register_profile("explore", deadline=None)
settings.load_profile("house")
