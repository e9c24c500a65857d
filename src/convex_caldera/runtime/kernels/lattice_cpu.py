"""E8P products on the CPU, straight from the packed bytes.

A code is two bytes (low, row), and its point row_k sign_k(low) + shift(low), k = 0 .. 7. Rows and
signs are tables of 8 KiB that stay in the first-level cache. One token is summed up without
writing the values down; with s_j the sum of its eight inputs of block j,

    (Q x)_i = scale sum_j [ sum_k row_k sign_k x_jk + shift s_j ].

For more tokens a slice of rows is decoded and multiplied as a matrix, at about the cost of one
token more. The tables are read off `e8p_points`, the definition, so they cannot drift from it.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from convex_caldera.core.protocols import FittedQuantizer
from convex_caldera.quantizers import e8p_points
from convex_caldera.quantizers.e8p import FittedE8P
from convex_caldera.runtime.kernels.reference import (
    SLICE_VALUES,
    Slices,
    product,
    product_transposed,
)

_NO_PLANE = np.zeros(0, np.uint8)

Tables = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]


@cache
def _tables() -> Tables:
    """Rows (256, 8), signs (256, 8), shifts (256,) of E8P, and the points of E81B (256, 8)."""
    numbers = torch.arange(256)
    at_zero = e8p_points.decode_e8p(numbers << 8)  # low byte 0: no sign changed, shift +1/4
    rows = at_zero - e8p_points.SHIFT
    of_low = e8p_points.decode_e8p(numbers)
    ones = torch.stack([(numbers >> k) & 1 for k in range(8)]).sum(0)
    shifts = e8p_points.SHIFT * (1.0 - 2.0 * (ones & 1))
    signs = (of_low - shifts[:, None]) / rows[0]
    ball = e8p_points.ball_points()
    return tuple(np.ascontiguousarray(t.float().numpy()) for t in (rows, signs, shifts, ball))  # type: ignore[return-value]


def multiply(fitted: FittedQuantizer, packed: Tensor, x: Tensor) -> Tensor:
    """x (tokens, n) -> x Q^T (tokens, m), float32."""
    assert isinstance(fitted, FittedE8P)
    if x.shape[0] == 1:
        return _one_token(fitted, packed, x)
    return product(decoded_slices(fitted, packed), x, fitted.shape[0])


def _one_token(fitted: FittedE8P, packed: Tensor, x: Tensor) -> Tensor:
    m, n = fitted.shape
    padded = torch.nn.functional.pad(x[0], (0, -n % 8)).contiguous()
    sums = padded.view(-1, 8).sum(1)
    first, second = _planes(fitted, packed)
    inverse = np.float32(1.0 / fitted.quantizer.scales[1])
    out = np.empty(m, np.float32)
    bits = fitted.quantizer.bits
    _sum(first, second, *_tables(), inverse, bits, padded.numpy(), sums.numpy(), out)
    return torch.from_numpy(out)[None] * fitted.scale


def multiply_transposed(fitted: FittedQuantizer, packed: Tensor, y: Tensor) -> Tensor:
    """y (tokens, m) -> y Q (tokens, n), float32."""
    assert isinstance(fitted, FittedE8P)
    return product_transposed(decoded_slices(fitted, packed), y, fitted.shape[1])


def decoded_slices(fitted: FittedE8P, packed: Tensor) -> Slices:
    """Slices of rows and their values (rows, n), float32; the buffer is used again."""
    m, n = fitted.shape
    blocks = -(-n // 8)
    first, second = _planes(fitted, packed)
    step = max(SLICE_VALUES // (8 * blocks), 1)
    buffer = np.empty((min(step, m), 8 * blocks), np.float32)
    bits, scale = fitted.quantizer.bits, np.float32(fitted.scale.item())
    inverse = np.float32(1.0 / fitted.quantizer.scales[1])
    for start in range(0, m, step):
        rows = slice(start, min(start + step, m))
        out = buffer[: rows.stop - rows.start]
        begin = start * blocks
        _decode(first, second, *_tables(), inverse, scale, bits, begin, out.reshape(-1, 8))
        yield rows, torch.from_numpy(out)[:, :n]


def _planes(fitted: FittedE8P, packed: Tensor) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Bytes of the first stage, and of the second if there is one."""
    size = 2 * fitted.shape[0] * -(-fitted.shape[1] // 8)
    raw = packed.numpy()
    return raw[:size], raw[size:] if fitted.quantizer.bits > 2 else _NO_PLANE


@njit(cache=True, nogil=True, fastmath=True)
def _sum(first, second, rows, signs, shifts, ball, inverse, bits, x, sums, out):  # type: ignore[no-untyped-def]
    blocks = len(sums)
    for i in range(len(out)):
        total = np.float32(0.0)
        for j in range(blocks):
            at = i * blocks + j
            low, row = first[2 * at], first[2 * at + 1]
            part, shift = np.float32(0.0), shifts[low]
            if bits == 2:
                for k in range(8):
                    part += rows[row, k] * signs[low, k] * x[8 * j + k]
            elif bits == 3:
                point = second[at]
                for k in range(8):
                    value = rows[row, k] * signs[low, k] + inverse * ball[point, k]
                    part += value * x[8 * j + k]
            else:
                low2, row2 = second[2 * at], second[2 * at + 1]
                shift += inverse * shifts[low2]
                for k in range(8):
                    value = rows[row, k] * signs[low, k] + inverse * rows[row2, k] * signs[low2, k]
                    part += value * x[8 * j + k]
            total += part + shift * sums[j]
        out[i] = total


@njit(cache=True, nogil=True)
def _decode(first, second, rows, signs, shifts, ball, inverse, scale, bits, begin, out):  # type: ignore[no-untyped-def]
    for j in range(len(out)):
        at = begin + j
        low, row = first[2 * at], first[2 * at + 1]
        for k in range(8):
            out[j, k] = rows[row, k] * signs[low, k] + shifts[low]
        if bits == 3:
            point = second[at]
            for k in range(8):
                out[j, k] += inverse * ball[point, k]
        elif bits == 4:
            low2, row2 = second[2 * at], second[2 * at + 1]
            for k in range(8):
                out[j, k] += inverse * (rows[row2, k] * signs[low2, k] + shifts[low2])
        for k in range(8):
            out[j, k] *= scale
