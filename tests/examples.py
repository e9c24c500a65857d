"""How many examples a law is given: a share of them in every run, all of them in the slow one."""

from __future__ import annotations

from hypothesis import settings

# Examples of the profile "thorough"; "house", which is the default, gives QUICK in THOROUGH.
THOROUGH, QUICK = 100, 20
FEWEST = 4


def examples(most: int) -> settings:
    """Settings of a law that is worth `most` examples in the thorough profile.

    pytest loads the profile before it imports the tests.
    """
    profile = settings()
    share = (profile.max_examples or THOROUGH) / THOROUGH
    return settings(max_examples=max(FEWEST, round(share * most)))
