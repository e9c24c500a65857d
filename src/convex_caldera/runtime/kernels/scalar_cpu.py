"""Products with bit-stream scalar codes on the CPU: uniform grids, MXINT, NormalFloat, minifloats.

All are  value = (level[c] - z) * scale  with z and scale per group of columns, so one compiled
loop decodes them, straight from the packed bytes: code k occupies bits k b .. k b + b - 1 of the
stream, least significant first, which lie in at most two bytes for b <= 8. In float32 and in this
order of operations, so that values equal the quantizers' own bit for bit.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from convex_caldera.core.protocols import FittedQuantizer
from convex_caldera.quantizers.groups import PER_TENSOR, Groups
from convex_caldera.quantizers.lloyd_max import FittedLloydMax
from convex_caldera.quantizers.minifloat import FittedMinifloat
from convex_caldera.quantizers.mxint import FittedMXInt
from convex_caldera.quantizers.normal_float import FittedNormalFloat, levels
from convex_caldera.quantizers.uniform import FittedUniform
from convex_caldera.runtime.kernels.reference import (
    SLICE_VALUES,
    Slices,
    product,
    product_transposed,
)

Array = NDArray[np.float32]
Scalar = FittedUniform | FittedNormalFloat | FittedLloydMax | FittedMinifloat | FittedMXInt


def multiply(fitted: FittedQuantizer, packed: Tensor, x: Tensor) -> Tensor:
    """x (tokens, n) -> x Q^T (tokens, m), float32."""
    return product(decoded_slices(fitted, packed), x, fitted.shape[0])


def multiply_transposed(fitted: FittedQuantizer, packed: Tensor, y: Tensor) -> Tensor:
    """y (tokens, m) -> y Q (tokens, n), float32."""
    return product_transposed(decoded_slices(fitted, packed), y, fitted.shape[1])


def decoded_slices(fitted: FittedQuantizer, packed: Tensor) -> Slices:
    """Slices of rows and their values (rows, n), float32; the buffer is used again."""
    assert isinstance(fitted, Scalar)
    m, n = fitted.shape
    bits, group_size = fitted.quantizer.bits, fitted.quantizer.group_size
    width = Groups(fitted.shape, group_size).width
    table, scales, zeros = _grid(fitted)
    step = max(SLICE_VALUES // n, 1)
    buffer = np.empty((min(step, m), n), np.float32)
    for start in range(0, m, step):
        rows = slice(start, min(start + step, m))
        out = buffer[: rows.stop - rows.start]
        first = 0 if group_size == PER_TENSOR else start
        per_row = group_size != PER_TENSOR
        _decode(packed.numpy(), bits, start * n, table, scales, zeros, first, per_row, width, out)
        yield rows, torch.from_numpy(out)


def _grid(fitted: Scalar) -> tuple[Array, Array, Array]:
    """Levels by code, and scales and zero points by group, all float32."""
    stored = fitted.steps if isinstance(fitted, FittedMXInt) else fitted.scales.float()
    scales = stored.contiguous().numpy()
    no_zeros = np.zeros_like(scales)
    bits = fitted.quantizer.bits
    if isinstance(fitted, FittedNormalFloat):
        return levels(bits).numpy(), scales, no_zeros
    if isinstance(fitted, FittedLloydMax):
        return fitted.levels.float().numpy(), scales, no_zeros
    if isinstance(fitted, FittedMinifloat):
        return fitted.quantizer.levels.numpy(), scales, no_zeros
    codes = np.arange(1 << bits, dtype=np.float32)
    if isinstance(fitted, FittedMXInt):
        return codes - np.float32(fitted.quantizer.largest), scales, no_zeros
    if fitted.zero_points is None:
        return codes - np.float32(fitted.quantizer.middle), scales, no_zeros
    return codes, scales, fitted.zero_points.float().contiguous().numpy()


@njit(cache=True, nogil=True)
def _decode(packed, bits, begin, table, scales, zeros, first, per_row, width, out):  # type: ignore[no-untyped-def]
    rows, columns = out.shape
    mask, last = (1 << bits) - 1, len(packed) - 1
    for i in range(rows):
        group_row = first + i if per_row else 0
        bit = (begin + i * columns) * bits
        for left in range(0, columns, width):
            scale, zero = scales[group_row, left // width], zeros[group_row, left // width]
            for j in range(left, min(left + width, columns)):
                at = bit >> 3
                word = np.int64(packed[at]) | np.int64(packed[min(at + 1, last)]) << 8
                out[i, j] = (table[word >> (bit & 7) & mask] - zero) * scale
                bit += bits
