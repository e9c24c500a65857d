"""The least weight mu of the nuclear norm whose solution has at most a given rank.

The rank falls with mu and the cost of a solution rises with its rank. So mu is lowered from where
the solution is zero, by STEP at a time, until the rank is exceeded, and only that last step is
halved on a logarithmic scale: no solution of a rank much above the wanted one is ever computed.
"""

from __future__ import annotations

from collections.abc import Callable

STEP = 0.5


def least_within(
    rank_at: Callable[[float], int], wanted: int, high: float, floor: float, precision: float
) -> float:
    """The least mu found with rank_at(mu) <= wanted.

    Args:
        rank_at: falls with mu, though not strictly everywhere.
        wanted: >= 0.
        high: the rank is 0 from there on.
        floor: the search ends there at the latest; 0 < floor <= high.
        precision: ratio of the bracket's ends at which to stop, > 1.
    """
    low = high
    while low > floor:
        low = max(STEP * low, floor)
        if rank_at(low) > wanted:
            break
        high = low
    while high > precision * low:
        middle = (low * high) ** 0.5
        if rank_at(middle) <= wanted:
            high = middle
        else:
            low = middle
    return high
