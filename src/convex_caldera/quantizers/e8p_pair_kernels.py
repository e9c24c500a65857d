"""The two-stage search of `e8p_pairs`, compiled for the CPU a cache-sized chunk at a time."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import njit

from convex_caldera.quantizers import e8p_points
from convex_caldera.quantizers.e8p_kernels import (
    Codes,
    Floats,
    _decode,
    _nearest,
    row_table,
    shell_rows,
    signed_rows,
)
from convex_caldera.quantizers.e81b_kernels import _nearest as _nearest_ball
from convex_caldera.quantizers.e81b_kernels import code_table

_CHUNK = 512


class Search(NamedTuple):
    """What the compiled search is given beside x.

    Attributes:
        second_bits: of the second stage: 8 is E81B, 16 is E8P, 0 none.
        gains: rho and 1 / rho.
        neighbors: of each shift's nearest point that are tried too.
        first, ball: tables of E8P and of E81B.
    """

    second_bits: int
    gains: tuple[Any, Any]
    neighbors: int
    first: tuple[Codes, Floats, Floats]
    ball: tuple[Codes, Floats]


@cache
def search(second_bits: int, rho: float, neighbors: int) -> Search:
    """The search of one quantizer, with its tables."""
    first = (row_table(), shell_rows(), signed_rows())
    ball = (code_table(), e8p_points.ball_points().numpy())
    return Search(second_bits, (np.float32(rho), np.float32(1.0 / rho)), neighbors, first, ball)


def nearest_pairs(x: Floats, second_bits: int, rho: float, neighbors: int) -> Codes:
    """Codes (N,), first << second_bits | second, of x (N, 8); 8 bits is E81B, 16 is E8P."""
    return _nearest_pairs(x, search(second_bits, rho, neighbors))


@njit(cache=True, nogil=True)
def _nearest_pairs(x: Floats, how: Search) -> Codes:
    codes = np.zeros(x.shape[0], dtype=np.int64)
    for start in range(0, x.shape[0], _CHUNK):
        part = x[start : start + _CHUNK]
        best = codes[start : start + _CHUNK]
        errors = np.full(part.shape[0], np.inf, dtype=np.float32)
        shifts, _ = _nearest(part, how.first[0], how.first[1])
        for side in range(2):
            origin = shifts[:, side].copy()
            points = _decode(origin, how.first[2])
            gaps = part - points
            order = _descending(gaps, how.neighbors)
            for j in range(how.neighbors + 1):
                first, decoded = origin, points
                if j:
                    moved = _moved(points, gaps, order, j)
                    first = _nearest_e8p(moved, how.first)
                    decoded = _decode(first, how.first[2])
                    _put_back(first, decoded, moved, origin, points)
                _try(part, first, decoded, how, best, errors)
    return codes


@njit(cache=True, nogil=True, inline="always")
def _try(x: Floats, first: Codes, points: Floats, how: Search, best: Codes, errors: Floats) -> None:
    """Put the second stage behind the first points; keep what is nearer to x than `best`."""
    left = (x - points) * how.gains[0]
    if how.second_bits == 8:
        second = _nearest_ball(left, how.ball[0])
    else:
        second = _nearest_e8p(left, how.first)
        rest = _decode(second, how.first[2])
    for v in range(x.shape[0]):
        error = np.float32(0)
        for i in range(8):
            q2 = how.ball[1][second[v], i] if how.second_bits == 8 else rest[v, i]
            miss = points[v, i] + q2 * how.gains[1] - x[v, i]
            error += miss * miss
        if error < errors[v]:
            errors[v] = error
            best[v] = first[v] << how.second_bits | second[v]


@njit(cache=True, nogil=True)
def _nearest_e8p(x: Floats, first_tables: tuple[Codes, Floats, Floats]) -> Codes:
    codes, costs = _nearest(x, first_tables[0], first_tables[1])
    nearest = codes[:, 0].copy()
    for v in range(x.shape[0]):
        if costs[v, 1] < costs[v, 0]:
            nearest[v] = codes[v, 1]
    return nearest


@njit(cache=True, nogil=True)
def _descending(gaps: Floats, neighbors: int) -> Codes:
    """(N, neighbors + 1) coordinates of the largest |gaps|, largest first, ties in order."""
    order = np.zeros((gaps.shape[0], neighbors + 1), dtype=np.int64)
    for v in range(gaps.shape[0]):
        taken = 0
        for k in range(neighbors + 1):
            largest = np.float32(-1)
            for i in range(8):
                if abs(gaps[v, i]) > largest and not (taken >> i) & 1:
                    largest, order[v, k] = abs(gaps[v, i]), i
            taken |= 1 << order[v, k]
    return order


@njit(cache=True, nogil=True)
def _moved(points: Floats, gaps: Floats, order: Codes, j: int) -> Floats:
    """One step along the largest gap and one along the j-th."""
    moved = points.copy()
    for v in range(points.shape[0]):
        for i in (order[v, 0], order[v, j]):
            moved[v, i] += np.float32(-1) if gaps[v, i] < 0 else np.float32(1)
    return moved


@njit(cache=True, nogil=True)
def _put_back(beside: Codes, decoded: Floats, moved: Floats, first: Codes, points: Floats) -> None:
    """Where a moved point is not in the codebook, the point it came from."""
    for v in range(moved.shape[0]):
        inside = True
        for i in range(8):
            inside &= decoded[v, i] == moved[v, i]
        if not inside:
            beside[v] = first[v]
            for i in range(8):
                decoded[v, i] = points[v, i]
