"""Literal E8P: codes spelled out bit by bit, and the nearest of all 65 536 points by looking."""

from __future__ import annotations

from itertools import product

import numpy as np
from numpy.typing import NDArray

_HALVES = (
    "123 023 013 012 367 357 347 356 346 345 267 257 247 256 246 245 167 157 147 156 146 045"
    " 067 057 047 056 046 014 237"
)


def literal_rows() -> list[list[float]]:
    """The 256 rows: squared norm <= 10 in lexicographic order, then 29 of squared norm 12."""
    ball = [list(r) for r in product((0.5, 1.5, 2.5), repeat=8) if sum(v * v for v in r) <= 10]
    return ball + [
        [0.5 if str(i) in halves else 1.5 for i in range(8)] for halves in _HALVES.split()
    ]


def literal_point(code: int, rows: list[list[float]]) -> list[float]:
    """One code, step by step as the format says."""
    row, low = list(rows[code >> 8]), code & 255
    odd = bin(low).count("1") % 2
    if odd:
        low ^= 1
    if sum(row) % 2 == 1:
        row[7] = -row[7]
    for i, bit in enumerate((0, 4, 1, 5, 2, 6, 3, 7)):
        if low >> bit & 1:
            row[i] = -row[i]
    return [v - 0.25 if odd else v + 0.25 for v in row]


def all_points() -> NDArray[np.float64]:
    """(65536, 8)."""
    rows = literal_rows()
    return np.array([literal_point(code, rows) for code in range(1 << 16)])


def least_distances(x: NDArray[np.float64], points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Squared distance of each x (N, 8) to its nearest point."""
    norms = (points**2).sum(1)
    return (x**2).sum(1) + (norms - 2 * x @ points.T).min(1)
