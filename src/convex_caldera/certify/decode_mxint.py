"""MXINT: value = (code - (2^(bits-1) - 1)) * 2^(E - (bits - 2)), one exponent E per group.

Exponents are a bit stream of `exponent_bits` each, in the order of the groups. E = stored - 127,
plus the byte `base` if exponents are shorter than 8 bits; E <= 127. The code 2^bits - 1 does not
occur. `exponent_rule` only says how E was found.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from convex_caldera.certify.codec import (
    Array,
    Layout,
    QuantizerFormat,
    Record,
    Shape,
    integer,
    one_of,
)
from convex_caldera.certify.decode_bits import packed_size, unpack
from convex_caldera.certify.decode_groups import grid, spread
from convex_caldera.errors import FormatError

BIAS, MOST = 127, 127


def layout(record: Record, shape: Shape) -> Layout:
    groups = grid(shape, record["group_size"])
    tensors: Layout = {
        "codes": ("U8", (packed_size(shape[0] * shape[1], record["bits"]),)),
        "exponents": ("U8", (packed_size(groups[0] * groups[1], record["exponent_bits"]),)),
    }
    if record["exponent_bits"] < 8:
        tensors["base"] = ("U8", (1,))
    return tensors


def decode(record: Record, shape: Shape, tensors: Mapping[str, Array]) -> NDArray[np.float32]:
    bits, width = record["bits"], record["exponent_bits"]
    zero = (1 << (bits - 1)) - 1
    codes = unpack(tensors["codes"], bits, shape[0] * shape[1]).reshape(shape)
    if codes.max() > 2 * zero:
        raise FormatError(f"a code is {codes.max()}, the largest is {2 * zero}")
    groups = grid(shape, record["group_size"])
    stored = unpack(tensors["exponents"], width, groups[0] * groups[1]).astype(np.int64)
    exponents = stored + (int(tensors["base"][0]) if width < 8 else 0) - BIAS
    if exponents.max() > MOST:
        raise FormatError(f"a shared exponent is {exponents.max()}, the largest is {MOST}")
    steps = np.ldexp(1.0, exponents - (bits - 2)).astype(np.float32).reshape(groups)
    step = spread(steps, shape, record["group_size"])
    values: NDArray[np.float32] = (codes.astype(np.float32) - np.float32(zero)) * step
    return values


FORMAT = QuantizerFormat(
    {
        "bits": integer(2, 8),
        "group_size": integer(-1),
        "exponent_bits": integer(2, 8),
        "exponent_rule": one_of("ocp", "legacy"),
    },
    layout,
    decode,
)
