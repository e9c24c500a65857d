"""Scalar levels with feedback, compiled for the CPU: a panel of columns, row by row."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)
def round_panel(goal: Any, base: Any, coupling: Any, scale: Any, bounds: Any, levels: Any) -> Any:
    """Codes (m, p) uint8 and values (m, p) of a panel.

    Column i is rounded to the cell of goal_i / scale, and its error is fed to all behind it:
    goal_k += (base_i - value_i) coupling_ik. The goal is overwritten by what was rounded.

    Args:
        goal, base, coupling: T, B and C of `fit.rounding.round_panel`.
        scale: of the levels; if 0, all numbers are 0.
        bounds: between the cells, one fewer than cells; a number on a bound is below it.
        levels: values of the cells.
    """
    rows, width = base.shape
    codes = np.empty((rows, width), np.uint8)
    values = np.empty((rows, width), np.float32)
    divisor = scale if scale > 0 else np.float32(np.inf)
    for r in range(rows):
        for i in range(width):
            codes[r, i] = _cell(goal[r, i] / divisor, bounds)
            values[r, i] = levels[codes[r, i]] * scale
            error = base[r, i] - values[r, i]
            for k in range(i + 1, width):
                goal[r, k] += error * coupling[i, k]
    return codes, values


@njit(cache=True, nogil=True)
def _cell(x: Any, bounds: Any) -> int:
    """How many bounds are below x."""
    low, high = 0, bounds.shape[0]
    while low < high:
        middle = (low + high) // 2
        if bounds[middle] < x:
            low = middle + 1
        else:
            high = middle
    return low
