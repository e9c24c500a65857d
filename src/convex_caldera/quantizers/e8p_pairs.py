"""Two E8P stages: a search among a few first points for the nearest pair.

Two stages write x = q1 + q2 / rho. The nearest q1 is not always part of the nearest pair, since
the balls q1 + q2 / rho overlap; so the second stage is tried behind a few first points: the
nearest one of either shift, p, and its `neighbors`

    p + sign(d_i) e_i + sign(d_j) e_j,    d = x - p,

i the largest |d| and j the second, third, ... largest (the differences e_i +- e_j are the
shortest vectors of D8). On N(0, I) at 4 bits, distortion with the nearest q1 alone, both shifts,
and one, two, four neighbors of each is .0084, .0079, .0076, .0075, .0075; the exact pair gives
.0075 too. QuIP# takes the nearest q1 alone.

This is the plain torch form, for any device and as oracle; `e8p_pair_kernels` is compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from convex_caldera.quantizers import e8p_points

_CHUNK = 1 << 16  # vectors that are searched at a time


@dataclass(frozen=True)
class Stage:
    """Points of a second stage, 2^bits of them: nearest is (N, 8) -> (N,), decode its inverse."""

    bits: int
    nearest: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]


E8P_STAGE = Stage(16, e8p_points.nearest_e8p, e8p_points.decode_e8p)
BALL_STAGE = Stage(8, e8p_points.nearest_ball, e8p_points.decode_ball)


def nearest_pairs(x: Tensor, second: Stage, rho: float, neighbors: int) -> Tensor:
    """Codes (N,), first << second.bits | second, of x (N, 8) in two stages.

    Args:
        x: float32, in units of the first stage's grid.
        second: points of the second stage.
        rho: its gain.
        neighbors: of each shift's nearest point that are tried too, 0 .. 7.
    """
    chunks = [_nearest_pairs(chunk, second, rho, neighbors) for chunk in x.split(_CHUNK)]
    return torch.cat(chunks)


def decode_pairs(codes: Tensor, second: Stage, rho: float) -> Tensor:
    """float32(q1 + float32(q2 * float32(1 / rho))), (N, 8), of combined codes (N,)."""
    first, rest = codes >> second.bits, codes & ((1 << second.bits) - 1)
    return e8p_points.decode_e8p(first) + second.decode(rest) * (1.0 / rho)


def _nearest_pairs(x: Tensor, second: Stage, rho: float, neighbors: int) -> Tensor:
    best_codes = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
    best_errors = torch.full((x.shape[0],), torch.inf, device=x.device)
    for first in _first_points(x, neighbors):
        codes = first << second.bits | second.nearest((x - e8p_points.decode_e8p(first)) * rho)
        errors = (decode_pairs(codes, second, rho) - x).square().sum(1)
        wins = errors < best_errors
        best_codes = torch.where(wins, codes, best_codes)
        best_errors = torch.where(wins, errors, best_errors)
    return best_codes


def _first_points(x: Tensor, neighbors: int) -> list[Tensor]:
    """Codes (N,) of the first points to try; p again for a neighbor outside the codebook."""
    codes, _ = e8p_points.nearest_shifts(x)
    found = [codes[:, 0], codes[:, 1]]
    for code in found[:2] if neighbors else []:
        point = e8p_points.decode_e8p(code)
        gap = x - point
        largest = gap.abs().sort(dim=1, descending=True, stable=True).indices
        for j in range(1, neighbors + 1):
            pair = largest[:, : j + 1 : j]  # the largest and the j-th
            step = torch.where(gap.gather(1, pair) < 0, -1.0, 1.0)
            moved = point.scatter_add(1, pair, step)
            beside = e8p_points.nearest_e8p(moved)
            inside = (e8p_points.decode_e8p(beside) == moved).all(1)
            found.append(torch.where(inside, beside, code))
    return found
