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
norm 12 exist (five 3/2, odd sum), so they are searched, and only if G_5 could still win.

Arithmetic is float64, so ties aside the result is the exact nearest point; `e8p_points` is the
oracle. Kernels release the GIL; callers own the threads.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numba import njit
from numpy.typing import NDArray

from convex_caldera.quantizers import e8p_points

Floats = NDArray[np.float32]
Codes = NDArray[np.int64]
Table = NDArray[np.int64]

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


@cache
def row_table() -> Table:
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
def shell_masks() -> Table:
    """(29,) masks of the coordinates at 3/2 in the rows of squared norm 12."""
    shell = e8p_points.rows()[227:].numpy() == 1.5
    return (shell * (1 << np.arange(8))).sum(1).astype(np.int64)


@cache
def row_values() -> Floats:
    """(256, 8) float32 rows, coordinate 7 negative where the sum is odd: signs then flip it."""
    table = e8p_points.rows().numpy().copy()
    table[table.sum(1) % 2 == 1, 7] *= -1
    return np.ascontiguousarray(table, dtype=np.float32)


@njit(cache=True, nogil=True)
def _sort_folded(a, keys):
    """keys = bit patterns of a >= 0, ascending, the coordinate in place of the last three bits.

    Nonnegative floats sort as their bit patterns do; what is overwritten is 2^-50 relative.
    """
    bits = a.view(np.int64)
    for i in range(8):
        keys[i] = (bits[i] & -8) | i
    for n in range(_NETWORK.shape[0]):
        i, j = _NETWORK[n, 0], _NETWORK[n, 1]
        x, y = keys[i], keys[j]
        keys[i], keys[j] = min(x, y), max(x, y)


@njit(cache=True, nogil=True)
def _search_shell(a, wrong, shell, best):
    """(mask, gain, flip) of the row of squared norm 12 that beats gain `best`, or mask 0."""
    best_mask, best_flip = 0, 0
    for m in range(shell.shape[0]):
        mask = shell[m]
        gain, flip, cheapest = 0.0, 0, np.inf
        for i in range(8):
            raised = (mask >> i) & 1
            gain += 2.0 * raised * (a[i] - 1.0)
            price = a[i] * (2.0 + 4.0 * raised)
            if price < cheapest:
                cheapest, flip = price, i
        gain -= wrong * cheapest
        if gain > best:
            best, best_mask, best_flip = gain, mask, flip
    return best_mask, best, best_flip


@njit(cache=True, nogil=True)
def _best_shell_row(a, order, gains, wrong, table, shell, best):
    """As `_search_shell`, but most often settled by the two best sets of five coordinates.

    `gains` are 2 (a_k - 1) in descending order less, if the parity is wrong, nothing yet.
    """
    fee = wrong * 2.0 * a[order[7]]
    four = gains[0] + gains[1] + gains[2] + gains[3] - fee
    mask = 1 << order[0] | 1 << order[1] | 1 << order[2] | 1 << order[3]
    if four + gains[4] <= best:
        return 0, best, 0
    if table[8, mask | 1 << order[4]] >= 0:
        return mask | 1 << order[4], four + gains[4], order[7]
    if four + gains[5] <= best:
        return 0, best, 0
    if table[8, mask | 1 << order[5]] >= 0:
        return mask | 1 << order[5], four + gains[5], order[7]
    if max(four + gains[6], four - gains[3] + gains[4] + gains[5]) <= best:
        return 0, best, 0
    return _search_shell(a, wrong, shell, best)


@njit(cache=True, nogil=True)
def _nearest_shifted(x, shift, table, shell, work):
    """Even-byte code of the nearest point of D^8 + shift, and its squared distance."""
    a, gains, keys, order = work
    negative, parity, base = 0, 0, 0.0
    for i in range(8):
        y = x[i] - shift
        below = np.int64(y < 0.0)
        negative |= below << i
        parity ^= below
        a[i] = abs(y)
        base += (a[i] - 0.5) * (a[i] - 0.5)
    _sort_folded(a, keys)
    for k in range(8):
        order[k] = keys[7 - k] & 7
        gains[k] = 2.0 * (a[order[k]] - 1.0)
    fee = 2.0 * a[order[7]]
    even_fee, odd_fee = fee * parity, fee * (1 - parity)

    # candidates as 256 * (coordinate at 5/2, or 8) + (mask of those at 3/2)
    best, choice = -even_fee, 8 << 8
    raised, gain = 8 << 8, 0.0
    for k in range(4):
        raised |= 1 << order[k]
        gain += gains[k]
        value = gain - (even_fee if k & 1 else odd_fee)
        choice = raised if value > best else choice
        best = max(best, value)
    value = 2.0 * gains[0] - 2.0 - even_fee
    choice = order[0] << 8 if value > best else choice
    best = max(best, value)
    value = 2.0 * gains[0] - 2.0 + gains[1] - odd_fee
    choice = order[0] << 8 | 1 << order[1] if value > best else choice
    best = max(best, value)
    flip = order[7]
    if gain + gains[4] - odd_fee > best:
        found, value, shell_flip = _best_shell_row(a, order, gains, 1 - parity, table, shell, best)
        if found:
            best, choice, flip = value, 8 << 8 | found, shell_flip

    odd = _PARITY[choice & 255]
    negative ^= (odd ^ parity) << flip
    negative ^= odd << 7
    return table[choice >> 8, choice & 255] << 8 | _SIGN_BYTE[negative], base - best


@njit(cache=True, nogil=True)
def _nearest(x, table, shell, work):
    """Code of the E8P point nearest to the 8-vector x."""
    upper, upper_cost = _nearest_shifted(x, 0.25, table, shell, work)
    lower, lower_cost = _nearest_shifted(x, -0.25, table, shell, work)
    return lower ^ 1 if lower_cost < upper_cost else upper


@njit(cache=True, nogil=True)
def _encode(x, table, shell):
    codes = np.empty(x.shape[0], dtype=np.int64)
    y = np.empty(8)
    work = (np.empty(8), np.empty(8), np.empty(8, np.int64), np.empty(8, np.int64))
    for v in range(x.shape[0]):
        for i in range(8):
            y[i] = x[v, i]
        codes[v] = _nearest(y, table, shell, work)
    return codes


@njit(cache=True, nogil=True)
def _decode(codes, rows):
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


def encode(x: Floats) -> Codes:
    """Codes (N,) of the E8P points nearest to x (N, 8), finite; ties go to +1/4."""
    return _encode(x, row_table(), shell_masks())


def decode(codes: Codes) -> Floats:
    """Points (N, 8), float32, of codes (N,), each 0 .. 65535."""
    return _decode(codes, row_values())
