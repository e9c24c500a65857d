"""Codes into stored tables: Lloyd-Max levels, k-means codewords, evenly spaced ranges.

    lloyd_max         value = levels[c] * scale
    kmeans            block of `dim` columns = codebook[c] * scale, missing columns dropped
    clipped_uniform   value = low + c * step
    ecsq, ecvq        as lloyd_max and kmeans with one scale and the rate as `bits`

all in float32, one rounding for each operation. bits * dim is a whole number of 1 to 12.
"""

from __future__ import annotations

import math
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
    real,
)
from convex_caldera.certify.decode_bits import packed_size, unpack
from convex_caldera.certify.decode_groups import grid, spread
from convex_caldera.errors import FormatError

Floats = NDArray[np.float32]
MAX_CODE_BITS = 12


def lloyd_max_layout(record: Record, shape: Shape) -> Layout:
    dtype = SCALE_DTYPES[record["scale_dtype"]]
    return {
        "codes": ("U8", (packed_size(shape[0] * shape[1], record["bits"]),)),
        "levels": (dtype, (1 << record["bits"],)),
        "scales": (dtype, grid(shape, record["group_size"])),
    }


def decode_lloyd_max(record: Record, shape: Shape, tensors: Mapping[str, Array]) -> Floats:
    codes = unpack(tensors["codes"], record["bits"], shape[0] * shape[1]).reshape(shape)
    levels = finite(tensors["levels"], "levels").astype(np.float32)
    scale = spread(finite(tensors["scales"], "scales"), shape, record["group_size"])
    values: Floats = levels[codes] * scale
    return values


def clipped_uniform_layout(record: Record, shape: Shape) -> Layout:
    dtype, groups = SCALE_DTYPES[record["scale_dtype"]], grid(shape, record["group_size"])
    return {
        "codes": ("U8", (packed_size(shape[0] * shape[1], record["bits"]),)),
        "lows": (dtype, groups),
        "steps": (dtype, groups),
    }


def decode_clipped_uniform(record: Record, shape: Shape, tensors: Mapping[str, Array]) -> Floats:
    codes = unpack(tensors["codes"], record["bits"], shape[0] * shape[1]).reshape(shape)
    low = spread(finite(tensors["lows"], "lows"), shape, record["group_size"])
    step = spread(finite(tensors["steps"], "steps"), shape, record["group_size"])
    values: Floats = low + codes.astype(np.float32) * step
    return values


def kmeans_layout(record: Record, shape: Shape) -> Layout:
    dim, bits, group_size = record["dim"], _code_bits(record), record["group_size"]
    if group_size > 0 and group_size % dim:
        raise FormatError(f"group_size {group_size} is no multiple of the block of {dim}")
    dtype, blocks = SCALE_DTYPES[record["scale_dtype"]], -(-shape[1] // dim)
    return {
        "codebook": (dtype, (1 << bits, dim)),
        "codes": ("U8", (packed_size(shape[0] * blocks, bits),)),
        "scales": (dtype, grid(shape, group_size)),
    }


def decode_kmeans(record: Record, shape: Shape, tensors: Mapping[str, Array]) -> Floats:
    (m, n), dim = shape, record["dim"]
    blocks = -(-n // dim)
    codes = unpack(tensors["codes"], _code_bits(record), m * blocks)
    codebook = finite(tensors["codebook"], "codebook").astype(np.float32)
    values = codebook[codes].reshape(m, blocks * dim)[:, :n]
    scaled: Floats = values * spread(
        finite(tensors["scales"], "scales"), shape, record["group_size"]
    )
    return scaled


def _code_bits(record: Record) -> int:
    bits = record["bits"] * record["dim"]
    if abs(bits - round(bits)) < 1e-9:  # (q / dim) * dim need not be q
        bits = round(bits)
    if bits != int(bits) or not 1 <= bits <= MAX_CODE_BITS:
        raise FormatError(f"a code of {bits} bits; whole numbers of 1 to {MAX_CODE_BITS} are")
    return int(bits)


def _scalar(record: Record) -> Record:
    """ECSQ as Lloyd-Max: codes of three more bits than the rate, at most eight."""
    return {**record, "bits": min(math.ceil(record["bits"]) + 3, 8), "group_size": -1}


def _vector(record: Record) -> Record:
    """ECVQ as k-means: codes of two more bits than the rate of a block."""
    rate = record["bits"] * record["dim"]
    if not 0.5 <= rate <= 6:
        raise FormatError(f"{rate} bits for a block of ecvq; 0.5 to 6 are possible")
    return {**record, "bits": (math.ceil(rate) + 2) / record["dim"], "group_size": -1}


_LEARNED = {
    "group_size": integer(-1),
    "normalize": one_of("rms", "absmax"),
    "iterations": integer(1),
    "seed": integer(-(1 << 63)),
    "scale_dtype": one_of(*SCALE_DTYPES),
}
LLOYD_MAX = QuantizerFormat(
    {**_LEARNED, "bits": integer(1, 8), "sample_size": integer(0)},
    lloyd_max_layout,
    decode_lloyd_max,
)
KMEANS = QuantizerFormat(
    {**_LEARNED, "bits": real(0, 12), "dim": integer(1, 32), "sample_size": integer(1)},
    kmeans_layout,
    decode_kmeans,
)
ECSQ = QuantizerFormat(
    {"bits": real(0.25, 6), "scale_dtype": one_of(*SCALE_DTYPES)},
    lambda record, shape: lloyd_max_layout(_scalar(record), shape),
    lambda record, shape, tensors: decode_lloyd_max(_scalar(record), shape, tensors),
)
ECVQ = QuantizerFormat(
    {
        "bits": real(0, 6),
        "dim": integer(1, 8),
        "iterations": integer(1),
        "sample_size": integer(1),
        "seed": integer(-(1 << 63)),
        "scale_dtype": one_of(*SCALE_DTYPES),
    },
    lambda record, shape: kmeans_layout(_vector(record), shape),
    lambda record, shape, tensors: decode_kmeans(_vector(record), shape, tensors),
)
CLIPPED_UNIFORM = QuantizerFormat(
    {
        "bits": integer(1, 8),
        "group_size": integer(-1),
        "clip_ratio": real(5e-324, 1),
        "scale_dtype": one_of(*SCALE_DTYPES),
    },
    clipped_uniform_layout,
    decode_clipped_uniform,
)
