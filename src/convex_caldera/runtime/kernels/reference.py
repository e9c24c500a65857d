"""Products with a coded matrix, decoding a slice of rows at a time.

A slice is decoded into a buffer that stays in cache, multiplied and forgotten. This needs to know
where the bytes of some rows are (`PLANES`); of other kinds the whole matrix is decoded per call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from convex_caldera.core.protocols import FittedQuantizer

# float32 values decoded at once; 1 MiB fits the second-level cache of common cores. Elsewhere a
# slice is what keeps a GPU busy longer than it takes to launch a few dozen operators.
SLICE_VALUES = 1 << 18
DEVICE_SLICE_VALUES = 1 << 24
# Slices start at multiples of this many rows, so that whole bytes are cut from any bit width.
ROW_STEP = 16

Slices = Iterator[tuple[slice, Tensor]]

# Consecutive planes of the packed codes: (bytes of ROW_STEP rows, bytes of the whole plane).
Planes = tuple[tuple[int, int], ...]


def _bit_stream(fitted: Any) -> Planes:
    (m, n), bits = fitted.shape, fitted.quantizer.bits
    return ((ROW_STEP * n * bits // 8, (m * n * bits + 7) // 8),)


def _codewords(fitted: Any) -> Planes:
    m, blocks, bits = fitted.shape[0], fitted.blocks, fitted.quantizer.code_bits
    return ((ROW_STEP * blocks * bits // 8, (m * blocks * bits + 7) // 8),)


def _lattice(fitted: Any) -> Planes:
    m, blocks = fitted.shape[0], -(-fitted.shape[1] // 8)
    stages = (2, fitted.quantizer.bits - 2)
    return tuple((ROW_STEP * blocks * size, m * blocks * size) for size in stages if size)


def _tiles(fitted: Any) -> Planes:
    full, rest = divmod(fitted.shape[1], ROW_STEP)
    row = 2 * full * fitted.quantizer.sixteenths + -(-rest * fitted.quantizer.sixteenths // 8)
    return ((row, -1),)


def _inner(fitted: Any) -> Planes | None:
    return planes_of(fitted.inner)


PLANES: dict[str, Callable[[Any], Planes | None]] = {
    "clipped_uniform": _bit_stream,
    "double_scale": _inner,
    "ecsq": _codewords,
    "ecvq": _codewords,
    "kmeans": _codewords,
    "lloyd_max": _bit_stream,
    "uniform": _bit_stream,
    "minifloat": _bit_stream,
    "mxint": _bit_stream,
    "normal_float": _bit_stream,
    "e8p": _lattice,
    "trellis": _tiles,
}
# Decoded as a whole: columns in another order every few rows, or patches of a network.
WHOLE = ("neural", "strip_order")


def planes_of(fitted: FittedQuantizer) -> Planes | None:
    """Where the bytes of rows are; None if the matrix is decoded as a whole."""
    known = PLANES.get(fitted.quantizer.kind)
    return None if known is None else known(fitted)


def multiply(fitted: FittedQuantizer, packed: Tensor, x: Tensor) -> Tensor:
    """x (tokens, n) -> x Q^T (tokens, m), float32."""
    return product(decoded_slices(fitted, packed), x, fitted.shape[0])


def multiply_transposed(fitted: FittedQuantizer, packed: Tensor, y: Tensor) -> Tensor:
    """y (tokens, m) -> y Q (tokens, n), float32."""
    return product_transposed(decoded_slices(fitted, packed), y, fitted.shape[1])


def product(slices: Slices, x: Tensor, m: int) -> Tensor:
    """x Q^T from slices of the rows of Q, each used before the next is asked for."""
    out = x.new_empty(x.shape[0], m)
    for rows, values in slices:
        torch.matmul(x, values.T, out=out[:, rows])
    return out


def product_transposed(slices: Slices, y: Tensor, n: int) -> Tensor:
    """y Q from slices of the rows of Q."""
    out = y.new_zeros(y.shape[0], n)
    for rows, values in slices:
        out.addmm_(y[:, rows], values)
    return out


def decoded_slices(fitted: FittedQuantizer, packed: Tensor) -> Slices:
    """Slices of rows and their decoded values (rows, n), float32, in order."""
    m, n = fitted.shape
    planes = planes_of(fitted)
    if planes is None:
        yield slice(0, m), fitted.decode(fitted.unpack(packed))
        return
    unit = math.lcm(ROW_STEP, fitted.row_block)
    values = SLICE_VALUES if packed.device.type == "cpu" else DEVICE_SLICE_VALUES
    step = max(values // (n * unit), 1) * unit
    for start in range(0, m, step):
        rows = slice(start, min(start + step, m))
        piece = fitted.take_rows(rows)
        yield rows, piece.decode(piece.unpack(slice_packed(packed, planes, rows, m)))


def slice_packed(packed: Tensor, planes: Planes, rows: slice, m: int) -> Tensor:
    """The bytes of some rows; `rows.start` is a multiple of ROW_STEP, `rows.stop` too or m."""
    pieces = []
    offset = 0
    for step_bytes, plane_bytes in planes:
        size = plane_bytes if plane_bytes >= 0 else packed.numel()
        first = rows.start // ROW_STEP * step_bytes
        last = size if rows.stop == m else rows.stop // ROW_STEP * step_bytes
        pieces.append(packed[offset + first : offset + last])
        offset += size
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
