"""NormalFloat: value = level[code] * scale in float32, levels at quantiles of N(0, 1).

With d = (1/30 + 1/32) / 2 and M = 2^(bits-1) the levels are z(p) / z(1 - d), rounded to float32,
for the probabilities d + (1/2 - d) k / (M - 1), k < M - 1, then 1/2, then
1/2 + (1/2 - d) k / M, k = 1 .. M. z is the inverse of the normal distribution function; here it
is the root of erfc by Newton's method, so that no table has to be trusted.

Source: Dettmers et al., QLoRA, arXiv 2305.14314.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache

import numpy as np
from numpy.typing import NDArray

from convex_caldera.certify.codec import (
    SCALE_DTYPES,
    Array,
    Layout,
    QuantizerFormat,
    Record,
    Shape,
    finite,
    integer,
    one_of,
)
from convex_caldera.certify.decode_bits import packed_size, unpack
from convex_caldera.certify.decode_groups import grid, spread

TAIL = (1 / 30 + 1 / 32) / 2
_STEPS = 60


def quantile(p: float) -> float:
    """z with P(N(0, 1) <= z) = p, for 0 < p < 1."""
    if p > 0.5:
        return -quantile(1 - p)
    z = 0.0
    for _ in range(_STEPS):  # convex and monotone left of 0: Newton from 0 cannot overshoot far
        error = 0.5 * math.erfc(-z / math.sqrt(2)) - p
        z -= error / (math.exp(-z * z / 2) / math.sqrt(2 * math.pi))
    return z


@cache
def levels(bits: int) -> NDArray[np.float32]:
    """(2^bits,) ascending from -1 to 1."""
    half = 1 << (bits - 1)
    width = 0.5 - TAIL
    below = [quantile(TAIL + width * k / (half - 1)) for k in range(half - 1)]
    above = [quantile(0.5 + width * k / half) for k in range(1, half + 1)]
    largest = quantile(1 - TAIL)
    return (np.array([*below, 0.0, *above]) / largest).astype(np.float32)


def layout(record: Record, shape: Shape) -> Layout:
    return {
        "codes": ("U8", (packed_size(shape[0] * shape[1], record["bits"]),)),
        "scales": (SCALE_DTYPES[record["scale_dtype"]], grid(shape, record["group_size"])),
    }


def decode(record: Record, shape: Shape, tensors: Mapping[str, Array]) -> NDArray[np.float32]:
    codes = unpack(tensors["codes"], record["bits"], shape[0] * shape[1]).reshape(shape)
    scale = spread(finite(tensors["scales"], "scales"), shape, record["group_size"])
    values: NDArray[np.float32] = levels(record["bits"])[codes] * scale
    return values


FORMAT = QuantizerFormat(
    {
        "bits": integer(2, 8),
        "group_size": integer(-1),
        "scale_dtype": one_of(*SCALE_DTYPES),
    },
    layout,
    decode,
)
