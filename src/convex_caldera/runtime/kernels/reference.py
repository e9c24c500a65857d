"""Products with a coded matrix, decoding a slice of rows at a time.

A slice is decoded into a buffer that stays in cache, multiplied and forgotten; the whole matrix
never exists. Where the packing of a quantizer is known to be row by row (`PLANES`), only the
slice's bytes are unpacked; for others the codes are unpacked once per call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from convex_caldera.core.protocols import FittedQuantizer

# float32 values decoded at once; 1 MiB fits the second-level cache of common cores.
SLICE_VALUES = 1 << 18
# Slices start at multiples of this many rows, so that whole bytes are cut from any bit width.
ROW_STEP = 16

# Bits per row in each consecutive plane of the packed codes, row-major within a plane.
PLANES: dict[str, Callable[[Any], tuple[int, ...]]] = {
    "uniform": lambda f: (f.shape[1] * f.quantizer.bits,),
    "normal_float": lambda f: (f.shape[1] * f.quantizer.bits,),
    "e8p": lambda f: tuple(
        -(-f.shape[1] // 8) * 8 * stage for stage in (2, f.quantizer.bits - 2) if stage
    ),
}


def multiply(fitted: FittedQuantizer, packed: Tensor, x: Tensor) -> Tensor:
    """x (tokens, n) -> x Q^T (tokens, m), float32."""
    out = x.new_empty(x.shape[0], fitted.shape[0])
    for rows, values in decoded_slices(fitted, packed):
        torch.matmul(x, values.T, out=out[:, rows])
    return out


def multiply_transposed(fitted: FittedQuantizer, packed: Tensor, y: Tensor) -> Tensor:
    """y (tokens, m) -> y Q (tokens, n), float32."""
    out = y.new_zeros(y.shape[0], fitted.shape[1])
    for rows, values in decoded_slices(fitted, packed):
        out.addmm_(y[:, rows], values)
    return out


def decoded_slices(fitted: FittedQuantizer, packed: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Slices of rows and their decoded values (rows, n), float32, in order."""
    m, n = fitted.shape
    step = max(SLICE_VALUES // (n * ROW_STEP), 1) * ROW_STEP
    planes = PLANES.get(fitted.quantizer.kind)
    codes = None if planes else fitted.unpack(packed)
    for start in range(0, m, step):
        rows = slice(start, min(start + step, m))
        piece = fitted.take_rows(rows)
        if planes is not None:
            part = piece.unpack(slice_packed(packed, planes(fitted), m, rows))
        else:
            part = _code_rows(codes, fitted, rows)
        yield rows, piece.decode(part)


def slice_packed(packed: Tensor, planes: tuple[int, ...], m: int, rows: slice) -> Tensor:
    """The bytes of some rows; `rows.start` is a multiple of eight, `rows.stop` too or m."""
    pieces = []
    offset = 0
    for bits in planes:
        first, last = rows.start * bits // 8, (rows.stop * bits + 7) // 8
        pieces.append(packed[offset + first : offset + last])
        offset += (m * bits + 7) // 8
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _code_rows(codes: Tensor | None, fitted: FittedQuantizer, rows: slice) -> Tensor:
    assert codes is not None  # unpacked above for every kind without planes
    block = fitted.row_block
    return codes[rows.start // block : -(-rows.stop // block)]
