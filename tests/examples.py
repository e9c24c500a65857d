"""How many examples a law is given: a share of them in every run, all of them in the slow one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
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


def first(quick: int, cases: Iterable[Any]) -> list[Any]:
    """Cases of a parametrized law: the first few in every run, the others in the slow one."""
    every = list(cases)
    slow = [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
        for case in every[quick:]
    ]
    return [*every[:quick], *slow]
