"""E8P with feedback, compiled for the CPU: a panel of columns, block after block.

Every block of 8 columns is rounded, and its error is fed to all columns behind it at once, so
that the loop of `fit.rounding.round_panel` leaves the interpreter once a panel.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from convex_caldera.quantizers.e8p_kernels import Codes, Floats, _decode
from convex_caldera.quantizers.e8p_pair_kernels import (
    Search,
    _nearest_e8p,
    _nearest_pairs,
    search,
)


def round_panel(
    goal: Floats,
    base: Floats,
    coupling: Floats,
    scales: tuple[np.float32, np.float32],
    second: tuple[int, float, int],
) -> tuple[Codes, Floats]:
    """Codes (m, blocks) and values (m, p) of a panel.

    Args:
        goal, base, coupling: T, B and C of `fit.rounding.round_panel`; T is overwritten by what
            the blocks were rounded to.
        scales: what T is divided by, and what points are multiplied by.
        second: bits, gain and neighbors of the second stage.
    """
    return _round_panel(goal, base, coupling, scales, search(*second))


@njit(cache=True, nogil=True)
def _round_panel(
    goal: Floats, base: Floats, coupling: Floats, scales: tuple[float, float], how: Search
) -> tuple[Codes, Floats]:
    rows, width = base.shape
    codes = np.empty((rows, (width + 7) // 8), dtype=np.int64)
    values = np.empty((rows, width), dtype=np.float32)
    x, error = np.empty((rows, 8), dtype=np.float32), np.empty(8, dtype=np.float32)
    for block in range(codes.shape[1]):
        start, end = 8 * block, min(8 * block + 8, width)
        x[:, end - start :] = 0
        for r in range(rows):
            for i in range(start, end):
                x[r, i - start] = goal[r, i] / scales[0]
        found, points = _rounded(x, how)
        for r in range(rows):
            codes[r, block] = found[r]
            for i in range(start, end):
                values[r, i] = points[r, i - start] * scales[1]
                error[i - start] = base[r, i] - values[r, i]
            _feed(goal[r], error, coupling, start)
    return codes, values


@njit(cache=True, nogil=True)
def _feed(goal: Floats, error: Floats, coupling: Floats, start: int) -> None:
    """Add the error of the block at `start` times C to the columns behind it."""
    for c in range(start + 8, goal.shape[0]):
        total = goal[c]
        for i in range(8):
            total += error[i] * coupling[start + i, c]
        goal[c] = total


@njit(cache=True, nogil=True, inline="always")
def _rounded(x: Floats, how: Search) -> tuple[Codes, Floats]:
    """Codes and points of x in units of the grid."""
    if how.second_bits == 0:
        codes = _nearest_e8p(x, how.first)
        return codes, _decode(codes, how.first[2])
    codes = _nearest_pairs(x, how)
    points = _decode(codes >> how.second_bits, how.first[2])
    low = (1 << how.second_bits) - 1
    if how.second_bits == 16:
        fine = _decode(codes & low, how.first[2])
    else:
        fine = how.ball[1][codes & low]
    return codes, points + fine * how.gains[1]
