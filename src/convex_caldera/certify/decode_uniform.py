"""Uniform grids: value = (code - zero_point) * scale in float32.

Affine grids store a zero point of `bits` bits per group, in the order of the scales. Symmetric
ones have the zero point (top + 1) // 2, or 1/2 at one bit, where top = 2^bits - 1, one less with
`legacy_levels`; codes above top are refused.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from convex_caldera.certify.codec import (
    SCALE_DTYPES,
    Array,
    Layout,
    QuantizerFormat,
    Record,
    Shape,
    boolean,
    finite,
    integer,
    one_of,
)
from convex_caldera.certify.decode_bits import packed_size, unpack
from convex_caldera.certify.decode_groups import grid, spread
from convex_caldera.errors import FormatError


def layout(record: Record, shape: Shape) -> Layout:
    bits, groups = record["bits"], grid(shape, record["group_size"])
    tensors: Layout = {
        "codes": ("U8", (packed_size(shape[0] * shape[1], bits),)),
        "scales": (SCALE_DTYPES[record["scale_dtype"]], groups),
    }
    if not record["symmetric"]:
        tensors["zero_points"] = ("U8", (packed_size(groups[0] * groups[1], bits),))
    return tensors


def decode(record: Record, shape: Shape, tensors: Mapping[str, Array]) -> NDArray[np.float32]:
    bits, group_size = record["bits"], record["group_size"]
    if record["legacy_levels"] and (not record["symmetric"] or bits < 2):
        raise FormatError("legacy_levels is for symmetric grids of at least 2 bits")
    codes = unpack(tensors["codes"], bits, shape[0] * shape[1]).reshape(shape)
    top = (1 << bits) - (2 if record["legacy_levels"] else 1)
    if codes.max() > top:
        raise FormatError(f"a code is {codes.max()}, the largest is {top}")
    scale = spread(finite(tensors["scales"], "scales"), shape, group_size)
    zero_point: NDArray[np.float32] | np.float32
    if record["symmetric"]:
        zero_point = np.float32(0.5 if bits == 1 else (top + 1) // 2)
    else:
        groups = grid(shape, group_size)
        stored = unpack(tensors["zero_points"], bits, groups[0] * groups[1])
        zero_point = spread(stored.reshape(groups), shape, group_size)
    values: NDArray[np.float32] = (codes.astype(np.float32) - zero_point) * scale
    return values


FORMAT = QuantizerFormat(
    {
        "bits": integer(1, 8),
        "group_size": integer(-1),
        "symmetric": boolean,
        "search": boolean,
        "scale_dtype": one_of(*SCALE_DTYPES),
        "legacy_levels": boolean,
    },
    layout,
    decode,
)
