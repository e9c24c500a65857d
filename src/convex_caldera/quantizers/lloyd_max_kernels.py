"""One pass over the weights, and the globally best levels of a sorted sample, compiled.

`histogram` turns any number of weights into sorted bins with their mass and first moment, in
memory that does not depend on the number; `best_cells` is exact dynamic programming on such bins
(Bruce 1964; Fleischer's conditions are not needed). Kernels release the GIL.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)
def histogram(W: Any, inverse: Any, mass: Any, columns: Any, width: int, low: float, step: float,
              count: Any, moment: Any) -> None:  # fmt: skip
    """Adds the weights of some rows (r, n) to bins `low + i * step`, each x = W * inverse.

    `inverse` and `mass` (r or 1, groups): 1 / scale and scale^2 of groups of `width` columns;
    `columns` (n,): importance. `count` and `moment` grow by sum w and sum w x of every bin.
    """
    rows, n = W.shape
    last = count.shape[0] - 1
    factor = 1.0 / step
    for i in range(rows):
        row = min(i, inverse.shape[0] - 1)
        for left in range(0, n, width):
            scale, weight = inverse[row, left // width], mass[row, left // width]
            for j in range(left, min(left + width, n)):
                x = W[i, j] * scale
                k = min(max(np.int64((x - low) * factor), 0), last)
                w = weight * columns[j]
                count[k] += w
                moment[k] += w * x


@njit(cache=True, nogil=True)
def best_cells(mass: Any, first: Any, second: Any, cells: int) -> Any:
    """Starts (cells,) of the contiguous cells of least squared error.

    `mass`, `first`, `second` (B + 1,) are prefix sums of w, w x, w x^2 of B sorted points, B >=
    cells. Row k of the programme is found by divide and conquer, since best starts rise with the
    end: cost cells * B * log B. Ties go to the leftmost start.
    """
    points = mass.shape[0] - 1
    cost = np.empty(points + 1)
    start = np.zeros((cells, points + 1), np.int32)
    cost[0] = 0.0
    for end in range(1, points + 1):
        cost[end] = _error(mass, first, second, 0, end)
    stack = np.empty((2 * 64, 4), np.int64)
    for k in range(1, cells):
        new = np.full(points + 1, np.inf)
        top = 0
        stack[0, 0], stack[0, 1], stack[0, 2], stack[0, 3] = k + 1, points, k, points - 1
        while top >= 0:
            lo, hi, left, right = stack[top, 0], stack[top, 1], stack[top, 2], stack[top, 3]
            top -= 1
            if lo > hi:
                continue
            middle = (lo + hi) // 2
            best = left
            for s in range(left, min(right, middle - 1) + 1):
                value = cost[s] + _error(mass, first, second, s, middle)
                if value < new[middle]:
                    new[middle] = value
                    best = s
            start[k, middle] = best
            top += 1
            stack[top, 0], stack[top, 1], stack[top, 2], stack[top, 3] = lo, middle - 1, left, best
            top += 1
            stack[top, 0], stack[top, 1], stack[top, 2], stack[top, 3] = middle + 1, hi, best, right
        cost = new
    found = np.zeros(cells, np.int64)
    end = points
    for k in range(cells - 1, 0, -1):
        end = start[k, end]
        found[k] = end
    return found


@njit(cache=True, nogil=True)
def _error(mass: Any, first: Any, second: Any, start: int, end: int) -> float:
    """Squared error of the points start .. end - 1 about their mean."""
    w = mass[end] - mass[start]
    if w <= 0:
        return 0.0
    s = first[end] - first[start]
    return max(second[end] - second[start] - s * s / w, 0.0)
