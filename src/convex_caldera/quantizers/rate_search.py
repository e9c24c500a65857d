"""The least price of a bit under which an entropy-constrained code keeps a rate.

A code made under the price 2^x of a bit has a rate that falls with x, almost on a line: where cells
are small the error is proportional to 2^(-2 rate / d), and the price is its slope. So x is found by
the secant of two prices whose rates lie on both sides, in four or five codes where halving an
interval takes a dozen or two. Each code may start from that of the nearest lower price: codewords
are only lost as a bit grows dearer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol, TypeVar


class Rated(Protocol):
    """A code with the entropy of its codes, in bits."""

    @property
    def rate(self) -> float: ...


R = TypeVar("R", bound=Rated)

_MOST_CODES = 24
# How far the second price is from the first at least.
_STEP = 0.02
# No new price is nearer to an end of the interval than this part of it.
_MARGIN = 0.02


def log_price(variance: float, rate: float, dim: int) -> float:
    """x where cells are small and rounding is uniform, for bits per block of `dim` numbers.

    error = (pi e / 6) variance 2^(-2 rate / dim) a number, and the price its slope per bit.
    """
    return math.log2(2 * math.log(2) * math.pi * math.e / 6 * variance) - 2 * rate / dim


def code_within(
    solve: Callable[[float, R | None], R], rate: float, dim: int, guess: float, tolerance: float
) -> R:
    """The code of least price found whose rate is at most `rate`, mostly by less than `tolerance`.

    Args:
        solve: the code under the price 2^x, and that of the nearest lower price known, if any.
        rate: bits per block of `dim` numbers.
        guess: x to begin with; prices lie within 2^-8 and 2^(8 + 2 rate / dim) of it, and at the
            dearest one the rate is taken to be low enough.
        tolerance: bits below `rate` that are not worth another code; nor is a price so near to
            one with too many bits that small cells would make up half as many.
    """
    low, high = guess - 8.0, guess + 8.0 + 2 * rate / dim
    above: tuple[float, R] | None = None  # too many bits
    below: tuple[float, R] | None = None
    x, step, repeated, last = guess, _STEP, 0, False
    for _ in range(_MOST_CODES):
        found = solve(x, None if above is None else above[1])
        over = found.rate > rate and x < high
        repeated, last = repeated + 1 if over == last else 1, over
        if over:
            above = (x, found)
        else:
            below = (x, found)
        if below is not None:
            close = above is not None and below[0] - above[0] < tolerance / dim
            if close or below[0] <= low or below[1].rate >= rate - tolerance:
                return below[1]
        aim = rate - tolerance / 2
        if above is not None and below is not None:  # half the way where one end stays and stays
            x = _between(above, below, aim) if repeated < 3 else (above[0] + below[0]) / 2
        else:  # as far as small cells would ask for, and ever farther where that is too little
            way = max(1.2 * abs(found.rate - aim) * 2 / dim, step)
            x, step = min(max(x + way if below is None else x - way, low), high), 2 * step
    return solve(high, None) if below is None else below[1]


def _between(above: tuple[float, R], below: tuple[float, R], aim: float) -> float:
    """Where the line through both has the aim."""
    share = (above[1].rate - aim) / (above[1].rate - below[1].rate)
    return above[0] + min(max(share, _MARGIN), 1 - _MARGIN) * (below[0] - above[0])
