"""Minifloats: value = level[code] * scale in float32; the highest bit of a code is the sign.

With e = `exponent_bits` and k = bits - 1 - e, the other bits are a field X of e and a mantissa M
of k bits: the magnitude is (M / 2^k) 2^(1 - bias) for X = 0, else (1 + M / 2^k) 2^(X - bias),
bias = 2^(e-1) - 1. Every pattern is a number.
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
    finite,
    integer,
    one_of,
)
from convex_caldera.certify.decode_bits import packed_size, unpack
from convex_caldera.certify.decode_groups import grid, spread
from convex_caldera.errors import FormatError


def levels(bits: int, exponent_bits: int) -> NDArray[np.float32]:
    """(2^bits,) the number of every code."""
    k, bias = bits - 1 - exponent_bits, (1 << (exponent_bits - 1)) - 1
    pattern = np.arange(1 << (bits - 1))
    field, mantissa = pattern >> k, (pattern & ((1 << k) - 1)) / (1 << k)
    positive = ((field > 0) + mantissa) * np.exp2(np.maximum(field, 1) - bias)
    return np.concatenate([positive, -positive]).astype(np.float32)


def layout(record: Record, shape: Shape) -> Layout:
    return {
        "codes": ("U8", (packed_size(shape[0] * shape[1], record["bits"]),)),
        "scales": (SCALE_DTYPES[record["scale_dtype"]], grid(shape, record["group_size"])),
    }


def decode(record: Record, shape: Shape, tensors: Mapping[str, Array]) -> NDArray[np.float32]:
    bits, exponent_bits = record["bits"], record["exponent_bits"]
    if exponent_bits >= bits:
        raise FormatError(f"{exponent_bits} exponent bits do not fit {bits} bits")
    codes = unpack(tensors["codes"], bits, shape[0] * shape[1]).reshape(shape)
    scale = spread(finite(tensors["scales"], "scales"), shape, record["group_size"])
    values: NDArray[np.float32] = levels(bits, exponent_bits)[codes] * scale
    return values


FORMAT = QuantizerFormat(
    {
        "bits": integer(3, 8),
        "exponent_bits": integer(1, 5),
        "group_size": integer(-1),
        "scale_dtype": one_of(*SCALE_DTYPES),
    },
    layout,
    decode,
)
