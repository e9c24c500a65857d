"""Scales of uniform grids: from the extremes of each group, then by weighted least squares.

A grid has values scale * (code - zero_point), codes 0 .. top. The range that covers a group
wastes levels on its extremes; the search minimizes

    sum_j w_j (x_j - scale k_j(scale))^2,      k = nearest level,

per group by shrinking the range in steps, then alternating k and scale = sum w x k / sum w k^2
(the two-step descent of Lloyd, restricted to uniform grids). A candidate is judged with its
scale as stored, and is taken only if it is strictly better, so search never loses.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_STEPS = 17
_REFINEMENTS = 3
# least fraction of the covering range worth trying, by bits: finer grids clip less
_LEAST_FRACTION = (0.1, 0.15, 0.25, 0.35, 0.5, 0.6, 0.7, 0.8)


@dataclass(frozen=True)
class Grid:
    """Scales and zero points, broadcastable to the weights they are for; codes 0 .. top."""

    scale: Tensor
    zero_point: Tensor
    top: int

    def codes(self, x: Tensor) -> Tensor:
        """Nearest codes of x as floats; where the scale is 0, the zero point."""
        divisor = torch.where(self.scale == 0, torch.inf, self.scale)
        return (x / divisor).add_(self.zero_point).round_().clamp_(0, self.top)

    def levels(self, x: Tensor) -> Tensor:
        """Nearest levels of x, code - zero_point."""
        return self.codes(x).sub_(self.zero_point)

    def error(self, x: Tensor, weights: Tensor) -> Tensor:
        """Weighted squared error of each group, (rows, groups, 1)."""
        missed = self.levels(x).mul_(self.scale).sub_(x).square_()
        return missed.mul_(weights).sum(-1, keepdim=True)

    def refit(self, x: Tensor, weights: Tensor) -> Tensor:
        """Least-squares scale for the present levels; the old one where they are all 0."""
        levels = self.levels(x)
        weighted = levels * weights
        power = (weighted * levels).sum(-1, keepdim=True)
        fitted = (weighted * x).sum(-1, keepdim=True) / power
        return torch.where(power > 0, fitted, self.scale)


def covering_affine(x: Tensor, bits: int) -> Grid:
    """The affine grid from min(x, 0) to max(x, 0), with an integer zero point."""
    top = (1 << bits) - 1
    least = x.amin(-1, keepdim=True).clamp(max=0)
    most = x.amax(-1, keepdim=True).clamp(min=0)
    scale = (most - least) / top
    zero_point = (-least / torch.where(scale == 0, torch.inf, scale)).round()
    return Grid(scale, zero_point, top)


def covering_symmetric(x: Tensor, zero_point: float, top: int) -> Grid:
    """The grid with levels -zero_point .. top - zero_point that just covers x."""
    above = x.amax(-1, keepdim=True).clamp(min=0) / (top - zero_point)
    below = -x.amin(-1, keepdim=True).clamp(max=0) / zero_point
    scale = torch.maximum(above, below)
    return Grid(scale, torch.full_like(scale, zero_point), top)


def search_scales(
    x: Tensor, weights: Tensor, starts: list[Grid], bits: int, dtype: torch.dtype, move_zero: bool
) -> Grid:
    """The best grid found for each group (see the module).

    Args:
        x: (rows, groups, members), float32.
        weights: >= 0, broadcastable to x.
        starts: covering grids; the first is what a tie falls back to.
        bits: 1 .. 8.
        dtype: in which scales are stored; those returned are representable in it.
        move_zero: also try the zero points beside the best one.

    Cost: about 7 passes over x for each of 16 fractions per start, and some 50 more.
    """
    best = _stored(starts[0], dtype)
    error = best.error(x, weights)
    for start in starts:
        for fraction in torch.linspace(1, _LEAST_FRACTION[bits - 1], _STEPS).tolist():
            shrunk = Grid(start.scale * fraction, start.zero_point, start.top)
            best, error = _better(x, weights, best, error, _stored(shrunk, dtype))
    for move in (0, -1, 1) if move_zero else (0,):
        trial = Grid(best.scale, (best.zero_point + move).clamp(0, best.top), best.top)
        for _ in range(_REFINEMENTS):
            trial = _stored(Grid(trial.refit(x, weights), trial.zero_point, trial.top), dtype)
            best, error = _better(x, weights, best, error, trial)
    return best


def _better(
    x: Tensor, weights: Tensor, best: Grid, error: Tensor, trial: Grid
) -> tuple[Grid, Tensor]:
    trial_error = trial.error(x, weights)
    wins = trial_error < error
    scale = torch.where(wins, trial.scale, best.scale)
    zero_point = torch.where(wins, trial.zero_point, best.zero_point)
    return Grid(scale, zero_point, best.top), torch.where(wins, trial_error, error)


def _stored(grid: Grid, dtype: torch.dtype) -> Grid:
    return Grid(grid.scale.to(dtype).float(), grid.zero_point, grid.top)
