"""Quantizers around another one: its scales quantized in turn, or its columns sorted by strips.

double_scale   W_ij = s_g V_ij,  s_g = offset + code_g step_h in float32,  V of the inner record
strip_order    V of the inner record; of every strip of rows, column order[k] of W is k of V

Tensors of the inner quantizer carry the prefix "inner_"; the codes are its codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convex_caldera.certify.codec import (
    Array,
    Layout,
    Option,
    QuantizerFormat,
    Record,
    Shape,
    check_record,
    finite,
    integer,
)
from convex_caldera.certify.decode_bits import packed_size, unpack
from convex_caldera.certify.decode_groups import grid, spread
from convex_caldera.errors import FormatError

PREFIX = "inner_"
MOST_COLUMNS = 1 << 16


Formats = Mapping[str, QuantizerFormat]
Tensors = Mapping[str, Array]


def _inner_record(formats: Formats) -> Option:
    """Accepts the complete record of a quantizer of one of these kinds."""

    def fits(value: Any) -> bool:
        kind = value.get("kind") if isinstance(value, dict) else None
        if not isinstance(kind, str) or kind not in formats:
            return False
        check_record(value, formats[kind].options, f"inner {kind}")
        return True

    return fits


def _inner_layout(formats: Formats, record: Record, shape: Shape) -> Layout:
    inner = formats[record["inner"]["kind"]].layout(record["inner"], shape)
    return {name if name == "codes" else PREFIX + name: item for name, item in inner.items()}


def _inner_values(
    formats: Formats, record: Record, shape: Shape, tensors: Tensors
) -> NDArray[np.float32]:
    inner = {
        name.removeprefix(PREFIX): tensor
        for name, tensor in tensors.items()
        if name.startswith(PREFIX) or name == "codes"
    }
    return formats[record["inner"]["kind"]].decode(record["inner"], shape, inner)


# --- double_scale ---------------------------------------------------------------------------


def scale_layout(record: Record, shape: Shape) -> Layout:
    """What the scales take, whatever they scale."""
    rows, groups = grid(shape, record["group_size"])
    count = rows * groups
    return {
        "scale_codes": ("U8", (packed_size(count, record["scale_bits"]),)),
        "steps": ("F32", (-(-count // record["super_group"]),)),
        "offset": ("F32", (1,)),
    }


def double_scales(record: Record, shape: Shape, tensors: Tensors) -> Array:
    """(m, groups) float32: offset + code * step, in float32."""
    rows, groups = grid(shape, record["group_size"])
    codes = unpack(tensors["scale_codes"], record["scale_bits"], rows * groups)
    steps, offset = finite(tensors["steps"], "steps"), finite(tensors["offset"], "offset")
    if (steps < 0).any() or (offset < 0).any():
        raise FormatError("steps and offset of scales must not be negative")
    wide = np.repeat(steps, min(record["super_group"], len(codes)))[: len(codes)]
    return (offset + codes.astype(np.float32) * wide).reshape(rows, groups)


def double_scale(formats: Formats) -> QuantizerFormat:
    """The format of `double_scale` around quantizers of these kinds."""

    def layout(record: Record, shape: Shape) -> Layout:
        return {**_inner_layout(formats, record, shape), **scale_layout(record, shape)}

    def decode(record: Record, shape: Shape, tensors: Tensors) -> NDArray[np.float32]:
        scale = spread(double_scales(record, shape, tensors), shape, record["group_size"])
        values: NDArray[np.float32] = _inner_values(formats, record, shape, tensors) * scale
        return values

    options = {
        "inner": _inner_record(formats),
        "group_size": integer(0),
        "scale_bits": integer(2, 8),
        "super_group": integer(1),
    }
    return QuantizerFormat(options, layout, decode)


# --- strip_order ----------------------------------------------------------------------------


def _width(record: Record, columns: int) -> int:
    if columns > MOST_COLUMNS:
        raise FormatError(f"strip_order numbers up to {MOST_COLUMNS} columns, not {columns}")
    return record["index_bits"] or max((columns - 1).bit_length(), 1)


def strip_order(formats: Formats) -> QuantizerFormat:
    """The format of `strip_order` around quantizers of these kinds."""

    def layout(record: Record, shape: Shape) -> Layout:
        indices = -(-shape[0] // record["strip"]) * shape[1]
        size = packed_size(indices, _width(record, shape[1]))
        return {**_inner_layout(formats, record, shape), "order": ("U8", (size,))}

    def decode(record: Record, shape: Shape, tensors: Tensors) -> NDArray[np.float32]:
        order = _orders(record, shape, tensors["order"])
        values = _inner_values(formats, record, shape, tensors)
        W = np.empty_like(values)
        for i in range(len(order)):
            rows = slice(i * record["strip"], min((i + 1) * record["strip"], shape[0]))
            W[rows, order[i]] = values[rows]
        return W

    options = {
        "inner": _inner_record(formats),
        "strip": integer(1),
        "index_bits": lambda value: type(value) is int and value in (0, 16),
    }
    return QuantizerFormat(options, layout, decode)


def _orders(record: Record, shape: Shape, packed: Array) -> NDArray[np.int64]:
    """(strips, n), every row a permutation."""
    m, n = shape
    strips, bits = -(-m // record["strip"]), _width(record, n)
    order = _wide_codes(packed, bits, strips * n).reshape(strips, n)
    if not np.array_equal(np.sort(order, axis=1), np.broadcast_to(np.arange(n), order.shape)):
        raise FormatError("order must list every column once in each strip")
    return order


def _wide_codes(packed: Array, bits: int, count: int) -> NDArray[np.int64]:
    """Codes of up to 16 bits: their bits, least significant first."""
    spare = 8 * len(packed) - count * bits
    stream = np.unpackbits(packed, bitorder="little")
    if not 0 <= spare < 8 or stream[count * bits :].any():
        raise FormatError(f"{count} indices of {bits} bits: wrong length, or spare bits not zero")
    weights = 1 << np.arange(bits, dtype=np.int64)
    return stream[: count * bits].reshape(count, bits) @ weights
