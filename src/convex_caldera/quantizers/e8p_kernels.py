"""Exact nearest E8P points without a table search, compiled for the CPU.

For one shift let a = |y| sorted descending. A row of squared norm <= 10 raises k <= 4
coordinates from 1/2 to 3/2, or one to 5/2 and at most one more to 3/2, and all such rows exist.
By the rearrangement inequality the largest a are raised, and a forced change of sign falls on
the least a, where it costs 2 a_8. With G_k = sum_{j <= k} 2 (a_j - 1) the gains over the row
(1/2, ..., 1/2) are

    G_k                      k = 0 .. 4        odd sum for odd k
    4 a_1 - 6                                  even sum
    4 a_1 - 6 + 2 (a_2 - 1)                    odd sum

less 2 a_8 where the parity is wrong: seven candidates in place of 227. Only 29 rows of squared
norm 12 exist (five 3/2, odd sum), so they are searched, and only where G_5 could still win.

Vectors are taken `_LANES` at a time, coordinates first, so that the compiler vectorizes over
them. Arithmetic is float32: results are nearest up to its rounding. `e8p_points` is the oracle.
Kernels release the GIL; callers own the threads.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from convex_caldera.quantizers import e8p_points

Floats = NDArray[np.float32]
Words = NDArray[np.int32]
Codes = NDArray[np.int64]

_LANES = 128
# Batcher's odd-even merge sort of eight keys
_NETWORK = np.array(
    [(0, 1), (2, 3), (4, 5), (6, 7), (0, 2), (1, 3), (4, 6), (5, 7), (1, 2), (5, 6)]
    + [(0, 4), (1, 5), (2, 6), (3, 7), (2, 4), (3, 5), (1, 2), (3, 4), (5, 6)]
)
_SIGN_BIT = np.array(e8p_points.SIGN_BIT)
# popcount(mask) mod 2, and the low code byte of a mask of negated coordinates
_PARITY = np.array([bin(mask).count("1") & 1 for mask in range(256)])
_SIGN_BYTE = np.array(
    [
        sum((mask >> i & 1) << bit for i, bit in enumerate(e8p_points.SIGN_BIT))
        for mask in range(256)
    ]
)
_ZERO, _HALF, _ONE = np.float32(0), np.float32(0.5), np.float32(1)
_TWO, _SIX = np.float32(2), np.float32(6)


@cache
def row_table() -> Codes:
    """(9, 256) row numbers or -1: [8, mask] raises the mask's coordinates to 3/2;

    [i, mask] has coordinate i at 5/2 and the mask's, i excluded, at 3/2.
    """
    table = np.full((9, 256), -1, dtype=np.int64)
    for number, row in enumerate(e8p_points.rows().numpy()):
        mask = sum(1 << i for i in range(8) if row[i] == 1.5)
        five_halves = np.flatnonzero(row == 2.5)
        table[five_halves[0] if five_halves.size else 8, mask] = number
    return table


@cache
def shell_rows() -> Floats:
    """(8, 29), 1 where a row of squared norm 12 has 3/2 and 0 where it has 1/2."""
    return np.ascontiguousarray(e8p_points.rows()[227:].T.numpy() - 0.5, dtype=np.float32)


@cache
def signed_rows() -> Floats:
    """(256, 8) rows with coordinate 7 negated where the sum is odd, as signs start from."""
    table = e8p_points.rows().numpy().copy()
    table[table.sum(1) % 2 == 1, 7] *= -1
    return np.ascontiguousarray(table, dtype=np.float32)


def nearest_shifts(x: Floats) -> tuple[Codes, Floats]:
    """The nearest point of either shift: codes (N, 2) for +1/4, -1/4, and squared distances.

    x is (N, 8), finite.
    """
    return _nearest(x, row_table(), shell_rows())


def nearest_e8p(x: Floats) -> Codes:
    """Codes (N,) of the points nearest to x (N, 8), finite; ties go to the shift +1/4."""
    codes, costs = nearest_shifts(x)
    return np.where(costs[:, 1] < costs[:, 0], codes[:, 1], codes[:, 0])


def decode(codes: Codes) -> Floats:
    """Points (N, 8), float32, of codes (N,), each 0 .. 65535."""
    return _decode(codes, signed_rows())


@njit(cache=True, nogil=True)
def _nearest(x: Floats, table: Codes, shell: Floats) -> tuple[Codes, Floats]:
    codes = np.empty((x.shape[0], 2), dtype=np.int64)
    costs = np.empty((x.shape[0], 2), dtype=np.float32)
    columns = np.zeros((8, _LANES), dtype=np.float32)
    keys = np.empty((8, _LANES), dtype=np.float32)
    bits = keys.view(np.int32)
    base, gain = np.empty(_LANES, dtype=np.float32), np.empty(_LANES, dtype=np.float32)
    signs, shape = np.empty(_LANES, dtype=np.int32), np.empty(_LANES, dtype=np.int32)
    reaches = np.empty(_LANES, dtype=np.int32)
    scratch = np.empty((2, shell.shape[1]), dtype=np.float32)
    for first in range(0, x.shape[0], _LANES):
        count = min(_LANES, x.shape[0] - first)
        for v in range(count):
            for i in range(8):
                columns[i, v] = x[first + v, i]
        for side in range(2):
            shift = np.float32(0.25 - 0.5 * side)
            _fold(columns, shift, keys, bits, signs, base)
            _sort(keys)
            _choose(keys, bits, signs, gain, shape, reaches)
            for v in range(count):
                if reaches[v]:
                    _try_shell(
                        columns, shift, v, keys, bits, signs, gain, shape, table, shell, scratch
                    )
                code = table[shape[v] >> 8, shape[v] & 255] << 8 | _SIGN_BYTE[signs[v] & 255]
                codes[first + v, side] = code ^ side
                costs[first + v, side] = base[v] - gain[v]
    return codes, costs


@njit(cache=True, nogil=True)
def _fold(
    columns: Floats, shift: float, keys: Floats, bits: Words, signs: Words, base: Floats
) -> None:
    """keys = |y|, its last three bits replaced by the coordinate (2^-20 relative); signs, the

    mask of y < 0; base, the squared distance to the row (1/2, ..., 1/2) with the signs of y.
    """
    signs[:] = 0
    base[:] = 0
    for i in range(8):
        for v in range(_LANES):
            y = columns[i, v] - shift
            folded = abs(y)
            signs[v] |= np.int32(y < 0) << np.int32(i)
            base[v] += (folded - _HALF) * (folded - _HALF)
            keys[i, v] = folded
        for v in range(_LANES):
            bits[i, v] = (bits[i, v] & np.int32(-8)) | np.int32(i)


@njit(cache=True, nogil=True)
def _sort(keys: Floats) -> None:
    """Each lane descending."""
    for n in range(_NETWORK.shape[0]):
        upper, lower = keys[_NETWORK[n, 0]], keys[_NETWORK[n, 1]]
        for v in range(_LANES):
            x, y = upper[v], lower[v]
            upper[v] = x if x > y else y
            lower[v] = y if x > y else x


@njit(cache=True, nogil=True, inline="always")
def _odd(mask: Any) -> Any:
    """popcount mod 2 of eight bits."""
    mask = mask ^ (mask >> np.int32(4))
    mask = mask ^ (mask >> np.int32(2))
    return (mask ^ (mask >> np.int32(1))) & np.int32(1)


@njit(cache=True, nogil=True, inline="always")
def _one(key: Any) -> Any:
    """Mask of the coordinate that a key carries."""
    return np.int32(1) << (key & np.int32(7))


@njit(cache=True, nogil=True)
def _choose(
    keys: Floats, bits: Words, signs: Words, gain: Floats, shape: Words, reaches: Words
) -> None:
    """The best of the seven candidates: its gain; its shape, 256 (coordinate at 5/2, or 8) plus

    the mask of those at 3/2; and signs with the parity put right. `reaches` marks the lanes
    where five coordinates at 3/2 might gain more.
    """
    for v in range(_LANES):
        wrong = _odd(signs[v])
        fee = _TWO * keys[7, v]
        even_fee, odd_fee = (fee, _ZERO) if wrong else (_ZERO, fee)
        total = _ZERO
        raised = np.int32(8 << 8)
        best, pick = -even_fee, raised
        for k in range(4):
            total += _TWO * (keys[k, v] - _ONE)
            raised |= _one(bits[k, v])
            value = total - (even_fee if k & 1 else odd_fee)
            pick = raised if value > best else pick
            best = value if value > best else best
        alone = _TWO * _TWO * keys[0, v] - _SIX
        five_halves = (bits[0, v] & np.int32(7)) << np.int32(8)
        value = alone - even_fee
        pick = five_halves if value > best else pick
        best = value if value > best else best
        value = alone + _TWO * (keys[1, v] - _ONE) - odd_fee
        pick = (five_halves | _one(bits[1, v])) if value > best else pick
        best = value if value > best else best
        gain[v] = best
        shape[v] = pick
        reaches[v] = np.int32(total + _TWO * (keys[4, v] - _ONE) - odd_fee > best)
        # a row of odd sum starts from a negative coordinate 7
        odd = _odd(pick)
        flip = (odd ^ wrong) << (bits[7, v] & np.int32(7))
        signs[v] ^= (flip ^ (odd << np.int32(7))) * (np.int32(1) - reaches[v])


@njit(cache=True, nogil=True)
def _try_shell(
    columns: Floats,
    shift: float,
    v: int,
    keys: Floats,
    bits: Words,
    signs: Words,
    gain: Floats,
    shape: Words,
    table: Codes,
    shell: Floats,
    scratch: Floats,
) -> None:
    """Replace the candidate of lane v by a row of squared norm 12 if one gains more; signs."""
    negative = signs[v]
    wrong = 1 - _PARITY[negative]
    mask, best, flip = _best_shell_row(
        columns, shift, v, keys, bits, wrong, table, shell, scratch, gain[v]
    )
    if mask:
        shape[v], gain[v] = 8 << 8 | mask, best
    odd = _PARITY[shape[v] & 255]
    signs[v] = negative ^ ((odd ^ _PARITY[negative]) << flip) ^ (odd << 7)


@njit(cache=True, nogil=True)
def _best_shell_row(
    columns: Floats,
    shift: float,
    v: int,
    keys: Floats,
    bits: Words,
    wrong: int,
    table: Codes,
    shell: Floats,
    scratch: Floats,
    best: float,
) -> tuple[int, float, int]:
    """(mask, gain, flip) of the row of squared norm 12 with more gain than `best`, or mask 0.

    Most often the two best sets of five coordinates settle it.
    """
    flip = bits[7, v] & 7
    four, mask = -wrong * _TWO * keys[7, v], 0
    for k in range(4):
        four += _TWO * (keys[k, v] - _ONE)
        mask |= 1 << (bits[k, v] & 7)
    for k in range(4, 6):
        value = four + _TWO * (keys[k, v] - _ONE)
        if value <= best:
            return 0, best, flip
        if table[8, mask | 1 << (bits[k, v] & 7)] >= 0:
            return mask | 1 << (bits[k, v] & 7), value, flip
    # 1 2 3 4 7 or 1 2 3 5 6 come next
    other = keys[4, v] + keys[5, v] - keys[3, v]
    if four + _TWO * (max(keys[6, v], other) - _ONE) <= best:
        return 0, best, flip
    found, best, shell_flip = _search_shell(columns, shift, v, wrong, shell, scratch, best)
    return found, best, shell_flip if found else flip


@njit(cache=True, nogil=True)
def _search_shell(
    columns: Floats, shift: float, v: int, wrong: int, shell: Floats, scratch: Floats, best: float
) -> tuple[int, float, int]:
    """As `_best_shell_row`, over all 29; gains and cheapest changes of sign side by side."""
    gain, cheapest = scratch[0], scratch[1]
    gain[:] = 0
    cheapest[:] = np.inf
    for i in range(8):
        folded = abs(columns[i, v] - shift)
        step = _TWO * (folded - _ONE)
        for m in range(shell.shape[1]):
            gain[m] += shell[i, m] * step
            price = folded * (_TWO + _TWO * _TWO * shell[i, m])
            cheapest[m] = price if price < cheapest[m] else cheapest[m]
    row = -1
    for m in range(shell.shape[1]):
        value = gain[m] - np.float32(wrong) * cheapest[m]
        if value > best:
            best, row = value, m
    if row < 0:
        return 0, best, 0
    mask, flip, least = 0, 0, np.float32(np.inf)
    for i in range(8):
        mask |= int(shell[i, row]) << i
        price = abs(columns[i, v] - shift) * (_TWO + _TWO * _TWO * shell[i, row])
        if price < least:
            flip, least = i, price
    return mask, best, flip


@njit(cache=True, nogil=True)
def _decode(codes: Codes, rows: Floats) -> Floats:
    points = np.empty((codes.shape[0], 8), dtype=np.float32)
    for v in range(codes.shape[0]):
        low = codes[v] & 255
        odd = _PARITY[low]
        shift = np.float32(0.25 - 0.5 * odd)
        for i in range(8):
            value = rows[codes[v] >> 8, i]
            negate = (low ^ odd) >> _SIGN_BIT[i] & 1
            points[v, i] = (-value if negate else value) + shift
    return points
