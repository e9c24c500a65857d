"""One scale per group, so that one codebook serves a whole matrix.

    value = scale of the group * level,     level from a codebook fitted to W / scale

A learned codebook costs 16 bits an entry: a codebook per row of 4096 weights would cost 1 bit
per weight at 256 entries, one scale per row costs 1/256. After division by their root mean
square (or absolute maximum) the rows of a weight matrix are distributed nearly alike, so that
the shared codebook loses almost nothing. An error in units of the codebook weighs scale^2.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from convex_caldera.errors import RecipeError
from convex_caldera.quantizers.groups import PER_TENSOR, Groups

Normalize = Literal["rms", "absmax"]
# Importance below this fraction of the mean counts as this: no column is given up.
_LEAST_IMPORTANCE = 1e-3
_CHUNK = 1 << 20  # weights per chunk: float64 temporaries stay small


def check_normalize(normalize: str) -> None:
    """RecipeError unless it is a known way of scaling groups."""
    if normalize not in ("rms", "absmax"):
        raise RecipeError(f"normalize is rms or absmax, got {normalize!r}")


def natural_scales(W: Tensor, group_size: int, normalize: Normalize) -> Tensor:
    """Root mean square, or largest absolute value, of each group of W (m, n), before rounding.

    float64, in the shape of `Groups.grid`. Cost: one pass in float64, by chunks.
    """
    step = max(1, _CHUNK // W.shape[1])
    parts = []
    for rows in W.split(step):
        x = Groups((rows.shape[0], rows.shape[1]), group_size).split(rows).double()
        if group_size == PER_TENSOR:
            x = x.reshape(1, 1, -1)
        parts.append(x.abs().amax(-1) if normalize == "absmax" else x.square().sum(-1))
    if normalize == "absmax":
        stacked = torch.cat(parts)
        return stacked.amax(0, keepdim=True) if group_size == PER_TENSOR else stacked
    if group_size == PER_TENSOR:
        total = math.fsum(float(part) for part in parts)
        return W.new_full((1, 1), math.sqrt(total / W.numel()), dtype=torch.float64)
    return (torch.cat(parts) / _members(W, group_size)).sqrt()


def _members(W: Tensor, group_size: int) -> Tensor:
    """Weights in each group of a row; the last one may be short."""
    m, n = W.shape
    groups = Groups((m, n), group_size)
    starts = torch.arange(groups.grid[1], device=W.device) * groups.width
    return (n - starts).clamp(max=groups.width).double()


def floored(importance: Tensor) -> Tensor:
    """Importance over its mean, float32, none below a thousandth; ones if all is zero."""
    mean = float(importance.double().mean())
    if mean == 0:
        return torch.ones_like(importance, dtype=torch.float32)
    return (importance.double() / mean).clamp(min=_LEAST_IMPORTANCE).float()
