"""E8P lattice codes: eight weights a code, value = scale * (q1 + q2 / rho) in float32.

q1 is an E8P12 point named by 16 bits. High byte: which of 256 rows of absolute values; the rows
are all vectors of {1/2, 3/2, 5/2}^8 with squared norm at most 10 in lexicographic order, and 29
of squared norm 12. Low byte: if its parity is odd, bit 0 is toggled and 1/4 is subtracted from
every coordinate, else 1/4 is added; bit (0, 4, 1, 5, 2, 6, 3, 7)[i] then negates coordinate i;
rows whose sum is odd have coordinate 7 negated once more.

q2 is absent at 2 bits, a point of the E8 ball (one byte) at 3, an E8P12 point at 4. The first
stage's codes come first, two bytes each, then the second stage's; little-endian. The last block
of a row may reach beyond the matrix.

Source: Tseng et al., QuIP#, arXiv 2402.04396.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from itertools import product

import numpy as np
from numpy.typing import NDArray

from convex_caldera.certify.codec import (
    Array,
    Layout,
    QuantizerFormat,
    Record,
    Shape,
    boolean,
    finite,
    integer,
)
from convex_caldera.errors import FormatError

BLOCK = 8
_SIGN_BIT = (0, 4, 1, 5, 2, 6, 3, 7)
# rows 227 .. 255: the three coordinates that are 1/2, the other five being 3/2
_HALVES = (
    "123 023 013 012 367 357 347 356 346 345 267 257 247 256 246 245 167 157 147 156 146 045"
    " 067 057 047 056 046 014 237"
)
# rho by (bits, joint_scale); one stage has none
_RHO = {(3, True): 1.77, (3, False): 2.04, (4, True): 3.7, (4, False): 3.45}


@cache
def point_table() -> NDArray[np.float32]:
    """(65536, 8): the E8P12 point of every code."""
    rows = [r for r in product((0.5, 1.5, 2.5), repeat=8) if sum(v * v for v in r) <= 10]
    rows += [tuple(0.5 if str(i) in h else 1.5 for i in range(8)) for h in _HALVES.split()]
    table = np.repeat(np.array(rows, np.float32), 256, axis=0)
    low = np.tile(np.arange(256), len(rows))
    odd = np.array([bin(byte).count("1") % 2 for byte in range(256)])[low]
    flips = (low ^ odd)[:, None] >> np.array(_SIGN_BIT) & 1
    flips[:, 7] ^= table.sum(axis=1).astype(np.int64) % 2
    points: NDArray[np.float32] = (
        np.where(flips == 1, -table, table)
        + np.where(odd == 1, np.float32(-0.25), np.float32(0.25))[:, None]
    )
    return points


@cache
def ball_table() -> NDArray[np.float32]:
    """(256, 8): the points of E8 of squared norm 0 and 2, then 15 of squared norm 4.

    Integer points in lexicographic order, half-integer ones of even sum likewise, then
    2 e_0, ..., 2 e_7, -2 e_0, ..., -2 e_6.
    """
    whole = [p for p in product((-1.0, 0.0, 1.0), repeat=8) if sum(map(abs, p)) in (0, 2)]
    half = [p for p in product((-0.5, 0.5), repeat=8) if sum(p) % 2 == 0]
    axes = np.concatenate([2 * np.eye(8), -2 * np.eye(8)])[:15]
    return np.concatenate([whole, half, axes]).astype(np.float32)


def layout(record: Record, shape: Shape) -> Layout:
    blocks = shape[0] * -(-shape[1] // BLOCK)
    return {"codes": ("U8", (blocks * record["bits"],)), "scale": ("F32", (1,))}


def decode(record: Record, shape: Shape, tensors: Mapping[str, Array]) -> NDArray[np.float32]:
    bits = record["bits"]
    scale = finite(tensors["scale"], "scale").astype(np.float32)
    if scale[0] < 0:
        raise FormatError(f"the scale of an E8P matrix is {scale[0]}, below zero")
    count = shape[0] * -(-shape[1] // BLOCK)
    raw = np.ascontiguousarray(tensors["codes"])
    points = point_table()[raw[: 2 * count].view("<u2")]
    if bits > 2:
        second = (
            ball_table()[raw[2 * count :]]
            if bits == 3
            else point_table()[raw[2 * count :].view("<u2")]
        )
        points = points + second * np.float32(1.0 / _RHO[bits, record["joint_scale"]])
    values: NDArray[np.float32] = points.reshape(shape[0], -1)[:, : shape[1]] * scale
    return values


FORMAT = QuantizerFormat(
    {"bits": integer(2, 4), "joint_scale": boolean, "neighbors": integer(0, 7)}, layout, decode
)
