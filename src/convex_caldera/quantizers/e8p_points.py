"""The E8P12 points: 2 bits per weight on the E8 lattice (Tseng et al., QuIP#, arXiv 2402.04396).

D^8 is the set of half-odd-integer 8-vectors with even coordinate sum. A fixed list of 256
nonnegative rows says which absolute values occur; the codebook is

    { d + t (1, ..., 1) : d in D^8, |d| a row, t = +1/4 or -1/4 },       2^16 distinct points.

The sum rule fixes the parity of the signs, so 16 bits name a point: the high byte is the row;
the parity of the low byte is the shift (odd: -1/4), and with bit 0 toggled when odd, bit
`SIGN_BIT[i]` of the low byte negates coordinate i. Rows of odd sum have coordinate 7 negated
to begin with. E81B is a 256-point ball of E8 itself, the second stage of the 3-bit quantizer.

This file is the definition and the oracle: plain torch, any device. `e8p_kernels` and
`e81b_kernels` are faster.
"""

from __future__ import annotations

from functools import cache
from itertools import product

import torch
from torch import Tensor

SIGN_BIT = (0, 4, 1, 5, 2, 6, 3, 7)
SHIFT = 0.25
_CHUNK = 1 << 16  # vectors per chunk of the (vectors, 256) cost matrix

# Rows 227 .. 255, squared norm 12: where the three 1/2 stand, the other five are 3/2
# (appendix C.1 of the paper; any 29 of the 56 do, these are the ones in public checkpoints).
_NORM_12_HALVES = (
    "123 023 013 012 367 357 347 356 346 345 267 257 247 256 246 245 167 157 147 156 146 045"
    " 067 057 047 056 046 014 237"
)


@cache
def rows() -> Tensor:
    """(256, 8) float32: the absolute values of the points of D^8 that are used."""
    ball = [r for r in product((0.5, 1.5, 2.5), repeat=8) if sum(v * v for v in r) <= 10]
    shell = [
        tuple(0.5 if str(i) in halves else 1.5 for i in range(8))
        for halves in _NORM_12_HALVES.split()
    ]
    return torch.tensor(ball + shell)


@cache
def ball_points() -> Tensor:
    """(256, 8) float32: E81B, the 241 points of E8 with squared norm <= 2 and 15 of norm 4."""
    integers = [p for p in product((-1.0, 0.0, 1.0), repeat=8) if sum(map(abs, p)) in (0, 2)]
    halves = [p for p in product((-0.5, 0.5), repeat=8) if sum(p) % 2 == 0]
    twos = [tuple(v if i == j else 0.0 for j in range(8)) for v in (2.0, -2.0) for i in range(8)]
    return torch.tensor(integers + halves + twos[:15])


def decode_e8p(codes: Tensor) -> Tensor:
    """Points (..., 8), float32, of integer codes 0 .. 65535."""
    codes = codes.long()
    table = rows().to(codes.device)
    row, low = table[codes >> 8], codes & 255
    odd_shift = _parity(low)
    signs = low ^ odd_shift
    bits = torch.tensor(SIGN_BIT, device=codes.device)
    negate = (signs[..., None] >> bits) & 1
    negate[..., 7] ^= row.sum(-1).long() & 1
    return row * (1 - 2 * negate) + SHIFT * (1 - 2 * odd_shift)[..., None]


def nearest_shifts(x: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest point of either shift to x (N, 8): codes (N, 2) for +1/4, -1/4, and costs.

    For each row the distance is sum (|y_i| - s_i)^2 with y = x - shift, plus the cheapest
    forced change of sign, 4 min_i |y_i| s_i, where the parity of the signs of y is wrong. Of
    equal rows the first is taken. Costs are squared distances up to a constant per vector.
    """
    sides = [[_nearest_shifted(c, shift) for c in x.split(_CHUNK)] for shift in (SHIFT, -SHIFT)]
    codes = [torch.cat([code for code, _ in side]) for side in sides]
    costs = [torch.cat([cost for _, cost in side]) for side in sides]
    # toggling bit 0 makes the low byte odd: the mark of the shift -1/4
    return torch.stack([codes[0], codes[1] ^ 1], 1), torch.stack(costs, 1)


def nearest_e8p(x: Tensor) -> Tensor:
    """Codes (N,), int64, of the points nearest to x (N, 8); ties go to the shift +1/4."""
    codes, costs = nearest_shifts(x)
    return torch.where(costs[:, 1] < costs[:, 0], codes[:, 1], codes[:, 0])


def decode_ball(codes: Tensor) -> Tensor:
    """Points (..., 8) of E81B codes 0 .. 255."""
    return ball_points().to(codes.device)[codes.long()]


def nearest_ball(x: Tensor) -> Tensor:
    """Codes (N,), int64, of the E81B points nearest to x (N, 8)."""
    points = ball_points().to(x)
    half_norms = 0.5 * points.square().sum(1)
    return torch.cat([(c @ points.T - half_norms).argmax(1) for c in x.split(_CHUNK)])


def _nearest_shifted(x: Tensor, shift: float) -> tuple[Tensor, Tensor]:
    """Codes with an even low byte of the points of D^8 + shift nearest to x, and their costs.

    The cost is the squared distance less |x|^2 + 8 shift^2, which all points share, so that
    outliers do not drown the differences: |s|^2 - 2 |y|.s - 2 shift sum(x), y = x - shift.
    """
    y = x - shift
    table = rows().to(y)
    folded, negative = y.abs(), y < 0
    odd_rows = table.sum(1).long() & 1
    mismatch = (negative.sum(1)[:, None] + odd_rows) & 1
    cost = table.square().sum(1) - 2 * folded @ table.T
    flip = torch.full_like(cost, torch.inf)
    for i in range(8):
        flip = torch.minimum(flip, folded[:, i, None] * table[:, i])
    cost = cost + 4 * flip * mismatch
    least, row = cost.min(1)
    cheapest = (folded * table[row]).argmin(1)
    flipped = torch.nn.functional.one_hot(cheapest, 8) * mismatch.gather(1, row[:, None])
    negate = negative.long() ^ flipped
    negate[:, 7] ^= odd_rows[row]
    bits = torch.tensor(SIGN_BIT, device=y.device)
    return (row << 8) | (negate << bits).sum(1), least - 2 * shift * x.sum(1)


def _parity(byte: Tensor) -> Tensor:
    byte = byte ^ (byte >> 4)
    byte = byte ^ (byte >> 2)
    return (byte ^ (byte >> 1)) & 1
