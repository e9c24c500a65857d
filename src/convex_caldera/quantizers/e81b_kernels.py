"""Nearest E81B points in closed form, compiled for the CPU; `e8p_points` is the oracle.

E81B is four orbits of E8: the origin; the roots +-e_i +- e_j, of which the one along the two
largest |x| is nearest; the roots (+-1/2)^8 of even sum, which follow the signs of x with the
least |x| flipped where the parity is odd; and 2 e_i, -2 e_i without -2 e_7. The nearest point
maximizes x.p - |p|^2 / 2, so one candidate of each orbit is compared.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numba import njit

from convex_caldera.quantizers import e8p_points
from convex_caldera.quantizers.e8p_kernels import Codes, Floats

# where the orbits begin in the table of codes
_INTEGERS, _HALVES, _AXES = 0, 6561, 6561 + 256
_ORIGIN = (3**8 - 1) // 2
_POWERS = 3 ** np.arange(8)


@cache
def code_table() -> Codes:
    """(6833,) codes by key, -1 where there is no point.

    Keys: sum 3^i (p_i + 1) for integer points below 2, then the masks of negative halves, then
    2 i + (1 for -2 e_i).
    """
    table = np.full(_AXES + 16, -1, dtype=np.int64)
    for code, p in enumerate(e8p_points.ball_points().numpy()):
        if abs(p[0]) == 0.5:
            key = _HALVES + int(((p < 0) << np.arange(8)).sum())
        elif abs(p).max() == 2:
            key = _AXES + 2 * int(abs(p).argmax()) + int(p.sum() < 0)
        else:
            key = _INTEGERS + int(((p + 1) * _POWERS).sum())
        table[key] = code
    return table


def nearest(x: Floats) -> Codes:
    """Codes (N,) of the points nearest to x (N, 8), finite."""
    return _nearest(x, code_table())


@njit(cache=True, nogil=True)
def _nearest(x: Floats, table: Codes) -> Codes:
    codes = np.empty(x.shape[0], dtype=np.int64)
    for v in range(x.shape[0]):
        codes[v] = table[_nearest_key(x[v])]
    return codes


@njit(cache=True, nogil=True)
def _nearest_key(x: Floats) -> int:
    largest, second, least, axis = -1.0, -1.0, np.inf, -np.inf
    first_at, second_at, least_at, axis_at = 0, 0, 0, 0
    total, negative, parity = 0.0, 0, 0
    for i in range(8):
        value = abs(x[i])
        below = int(x[i] < 0)
        negative |= below << i
        parity ^= below
        total += value
        if value > largest:
            second, second_at = largest, first_at
            largest, first_at = value, i
        elif value > second:
            second, second_at = value, i
        if value < least:
            least, least_at = value, i
        along = value if i < 7 else x[i]
        if along > axis:
            axis, axis_at = along, i
    root, half, double = largest + second - 1, 0.5 * total - parity * least - 1, 2 * axis - 2
    if max(root, half, double) <= 0:
        return _INTEGERS + _ORIGIN
    if root >= half and root >= double:
        step = _POWERS[first_at] * (1 - 2 * (negative >> first_at & 1))
        return (
            _INTEGERS + _ORIGIN + step + _POWERS[second_at] * (1 - 2 * (negative >> second_at & 1))
        )
    if half >= double:
        return _HALVES + (negative ^ (parity << least_at))
    return _AXES + 2 * axis_at + (negative >> axis_at & 1)
