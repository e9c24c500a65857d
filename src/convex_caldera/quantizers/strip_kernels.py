"""The greedy chain of columns, compiled; `chain_reference` is the definition."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

WINDOW = 16  # placed columns whose mean the next one is to resemble (ReALLM's code)


def chain_reference(part: NDArray[np.float32]) -> NDArray[np.int64]:
    """Order (n,) of the columns of one strip (rows, n), starting with the first; ties keep order.

    The next column is nearest, in float64, to the mean of the last 16 that are placed.
    """
    columns = part.T.astype(np.float64)
    order, rest = [0], list(range(1, len(columns)))
    while rest:
        mean = columns[order[-WINDOW:]].mean(0)
        distances = [float(((columns[k] - mean) ** 2).sum()) for k in rest]
        order.append(rest.pop(int(np.argmin(distances))))
    return np.array(order, dtype=np.int64)


def chain(part: NDArray[np.float32]) -> NDArray[np.int64]:
    """The same; distances by float32 dot products, |c|^2 - 2 c.mean.

    Cost: rows n^2 / 2 multiply-adds.
    """
    columns = np.ascontiguousarray(part.T, dtype=np.float32)
    return _chain(columns, np.square(columns, dtype=np.float32).sum(1), WINDOW)


@njit(cache=True, nogil=True, fastmath=True)
def _chain(columns, norms, window):  # type: ignore[no-untyped-def]
    n, rows = columns.shape
    columns, norms = columns.copy(), norms.copy()
    order = np.arange(n)
    total = np.zeros(rows, np.float32)
    for k in range(n - 1):  # columns 0 .. k are placed; the best of the others goes to k + 1
        first = max(k + 1 - window, 0)
        total[:] = 0
        for j in range(first, k + 1):
            for i in range(rows):
                total[i] += columns[j, i]
        scale = np.float32(2.0 / (k + 1 - first))
        best, nearest = k + 1, np.float32(np.inf)
        for j in range(k + 1, n):
            dot = np.float32(0.0)
            for i in range(rows):
                dot += columns[j, i] * total[i]
            distance = norms[j] - scale * dot
            if distance < nearest:
                best, nearest = j, distance
        # Shift instead of swap, so that the unplaced columns keep their order.
        moved, moved_norm, moved_index = columns[best].copy(), norms[best], order[best]
        for j in range(best, k + 1, -1):
            columns[j] = columns[j - 1]
            norms[j] = norms[j - 1]
            order[j] = order[j - 1]
        columns[k + 1], norms[k + 1], order[k + 1] = moved, moved_norm, moved_index
    return order
