"""Scales shared by runs of columns: group_size g > 0 columns, 0 a whole row, -1 the matrix."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from convex_caldera.certify.codec import Array, Shape


def grid(shape: Shape, group_size: int) -> tuple[int, int]:
    """Shape of what is stored once per group; the last group of a row may be short."""
    if group_size < 0:
        return 1, 1
    if group_size == 0:
        return shape[0], 1
    return shape[0], -(-shape[1] // group_size)


def spread(values: Array, shape: Shape, group_size: int) -> NDArray[np.float32]:
    """Per-group values as float32, broadcastable to the matrix."""
    wide = values.astype(np.float32)
    if wide.shape[1] == 1:
        return wide
    return np.repeat(wide, group_size, axis=1)[:, : shape[1]]
