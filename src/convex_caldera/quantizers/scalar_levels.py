"""The best 2^b levels of weighted numbers: exact on a coarse sample, then Lloyd's two steps.

    minimize over c_1 <= ... <= c_K    sum_i w_i min_k (x_i - c_k)^2

The numbers are first sorted into at most 2^20 bins that remember their mass and mean (every
number by itself if there are few). On 2^11 groups of bins dynamic programming finds the globally
best levels; from there Lloyd's alternation runs on all bins (Lloyd 1982; Max 1960): cells end at
midpoints, found by binary search, and levels are the means of the cells, differences of prefix
sums. One such step costs K log B, whatever the number of weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from convex_caldera.quantizers.groups import Groups

Floats = NDArray[np.float64]
BINS = 1 << 20
COARSE = 1 << 11
_CHUNK = 1 << 22  # weights per call of the histogram
_TOLERANCE = 1e-9


@dataclass(frozen=True, eq=False)
class Points:
    """Sorted numbers (B,) with positive masses (B,), float64."""

    values: Floats
    mass: Floats

    def prefix_sums(self) -> tuple[Floats, Floats, Floats]:
        """Sums (B + 1,) of w, w x and w x^2 over the first points."""
        terms = (self.mass, self.mass * self.values, self.mass * self.values**2)
        return tuple(np.concatenate([[0.0], np.cumsum(term)]) for term in terms)  # type: ignore[return-value]


def sorted_points(W: Tensor, scales: Tensor, group_size: int, importance: Tensor | None) -> Points:
    """The numbers W / scale with mass importance * (scale / largest scale)^2, binned.

    Args:
        W: (m, n), finite.
        scales: per group, as stored; where 0, the numbers are 0.
        group_size: of the scales.
        importance: (n,) or None for ones.

    Cost: two passes over W on the CPU; memory of the bins and of one chunk.
    """
    scale = scales.double().cpu().numpy()
    inverse = np.divide(1.0, scale, out=np.zeros_like(scale), where=scale > 0)
    share = scale / scale.max() if scale.max() > 0 else np.ones_like(scale)
    columns = np.ones(W.shape[1]) if importance is None else importance.double().cpu().numpy()
    groups = Groups((W.shape[0], W.shape[1]), group_size)
    low, high = _range(W, inverse, groups)
    if W.numel() <= BINS:
        return _every_point(W, inverse, share**2, columns, groups)
    from convex_caldera.quantizers.lloyd_max_kernels import histogram

    count, moment = np.zeros(BINS), np.zeros(BINS)
    step = max((high - low) / BINS, np.finfo(np.float64).tiny)
    height = max(1, _CHUNK // W.shape[1])
    for start in range(0, W.shape[0], height):
        rows = W[start : start + height].float().cpu().numpy()
        part = slice(None) if scale.shape[0] == 1 else slice(start, start + len(rows))
        width = W.shape[1] if scale.shape[1] == 1 else groups.width
        histogram(rows, inverse[part], share[part] ** 2, columns, width, low, step, count, moment)
    full = count > 0
    return Points(moment[full] / count[full], count[full])


def best_levels(
    points: Points, size: int, iterations: int, tolerance: float | None = None
) -> Floats:
    """Ascending levels (size,); fewer points than levels: each its own, the last repeated."""
    if len(points.values) <= size:
        spare = size - len(points.values)
        return np.concatenate([points.values, np.full(spare, points.values[-1])])
    from convex_caldera.quantizers.lloyd_max_kernels import best_cells

    coarse = grouped(points, max(COARSE, 4 * size))
    if len(coarse.values) <= size:
        coarse = points
    starts = best_cells(*coarse.prefix_sums(), size)
    mass, first, _ = (sums[np.append(starts, len(coarse.values))] for sums in coarse.prefix_sums())
    return lloyd(points, np.diff(first) / np.diff(mass), iterations, tolerance)


def lloyd(
    points: Points, levels: Floats, iterations: int, tolerance: float | None = None
) -> Floats:
    """Lloyd's steps from given ascending levels; a level that loses its points stays.

    They end when the error falls by no more than `tolerance` (1e-9) of itself.
    """
    tolerance = _TOLERANCE if tolerance is None else tolerance
    mass, first, second = points.prefix_sums()
    last = np.inf
    for _ in range(iterations):
        ends = np.searchsorted(points.values, (levels[1:] + levels[:-1]) / 2)
        ends = np.concatenate([[0], ends, [len(points.values)]])
        w, s = np.diff(mass[ends]), np.diff(first[ends])
        levels = np.divide(s, w, out=levels.copy(), where=w > 0)
        error = float(second[-1] - (2 * levels * s - levels**2 * w).sum())
        if last - error <= tolerance * abs(error):
            break
        last = error
    return np.maximum.accumulate(levels)


def grouped(points: Points, size: int) -> Points:
    """At most 2 * size runs of points, each at its mean.

    Runs end where half the mass or half the range is due, so that neither the many nor the far
    are lost.
    """
    if len(points.values) <= size:
        return points
    reach = points.values[-1] - points.values[0]
    share = np.cumsum(points.mass) / points.mass.sum() + (points.values - points.values[0]) / reach
    cell = np.floor(share * size * 0.5).astype(np.int64)
    starts = np.flatnonzero(np.diff(cell, prepend=-1))
    mass = np.add.reduceat(points.mass, starts)
    return Points(np.add.reduceat(points.mass * points.values, starts) / mass, mass)


def _range(W: Tensor, inverse: Floats, groups: Groups) -> tuple[float, float]:
    """Least and largest of W * inverse."""
    factors = torch.from_numpy(inverse).float()
    low, high = np.inf, -np.inf
    height = max(1, _CHUNK // W.shape[1])
    for start in range(0, W.shape[0], height):
        rows = W[start : start + height].float().cpu()
        part = factors if factors.shape[0] == 1 else factors[start : start + len(rows)]
        x = rows * groups.spread(part, 0, W.shape[1])
        low, high = min(low, float(x.min())), max(high, float(x.max()))
    return low, high


def _every_point(
    W: Tensor, inverse: Floats, mass: Floats, columns: Floats, groups: Groups
) -> Points:
    """Few numbers: every distinct one, with the masses of its equals added."""
    factors = groups.spread(torch.from_numpy(inverse), 0, W.shape[1]).numpy()
    weights = groups.spread(torch.from_numpy(mass), 0, W.shape[1]).numpy() * columns
    x = (W.double().cpu().numpy() * factors).ravel()
    weights = np.broadcast_to(weights, tuple(W.shape)).ravel()
    return distinct_points(x, weights)


def distinct_points(x: Floats, weights: Floats) -> Points:
    """Every distinct number once, the masses of its equals added; those without mass dropped."""
    values, where = np.unique(x, return_inverse=True)
    totals = np.bincount(where.ravel(), weights=weights)
    full = totals > 0
    return (
        Points(values[full], totals[full]) if full.any() else Points(values, np.ones(len(values)))
    )
