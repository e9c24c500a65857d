"""Entropy-constrained scalar quantization: levels and cells for codes that are entropy-coded.

    minimize sum_i (x_i - c_k(i))^2 + lambda * length_k(i),    length_k = -log2 p_k

over levels c, cells and lambda, so that the entropy of the codes is `bits` (Chou, Lookabaugh &
Gray 1989). Cells are intervals between the crossings of neighboring parabolas, levels the means
of their cells. On N(0, 1) at 2 bits the error is .088, where the best four levels at fixed width
leave .1175; at high rates 1.53 dB are left to Shannon's limit, whatever the distribution.

One scale serves the matrix: with entropy-coded codes evenly fine levels are what rows of unequal
size ask for (reverse water-filling), and louder rows take more bits by themselves. Fixed-width
codes are wider than the rate, so the quantizer needs a coder. Levels are learned and stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from convex_caldera.coding.bitpack import packed_bytes
from convex_caldera.coding.symbols import num_parts
from convex_caldera.errors import RecipeError
from convex_caldera.quantizers.grouped import OneScaled
from convex_caldera.quantizers.groups import (
    SCALE_DTYPES,
    check_codes,
    check_columns,
    check_finite,
    check_group_options,
    check_matrix,
    checked_tensor,
    round_scales,
)
from convex_caldera.quantizers.normalized import natural_scales
from convex_caldera.quantizers.rate_search import code_within, log_price

LEAST_BITS, MOST_BITS = 0.25, 6.0
# The rate that levels are chosen for: rANS needs about a tenth of a percent more.
_RATE_SHARE = 0.999
# Bytes beside the symbols: range, frequencies of two bytes, the last word.
_STREAM_BYTES = 6
_RATE_TOLERANCE = 2e-4
_STEPS = 60
_TOLERANCE = 1e-7
_CHUNK = 1 << 22

Floats = NDArray[np.float64]


def header_bytes(codewords: int, symbols: int) -> int:
    """The most that a rANS stream takes beside its symbols."""
    return _STREAM_BYTES + 2 * codewords + 4 * num_parts(symbols)


@dataclass(frozen=True)
class ECSQ:
    """Scalar levels for entropy-coded codes of `bits` bits per weight.

    Args:
        bits: entropy of the codes, .25 to 6, any real number.
        scale_dtype: how scale and levels are stored, "float16", "bfloat16" or "float32".

    Raises:
        RecipeError: an option out of range.
    """

    bits: float = 2.0
    scale_dtype: str = "float16"

    kind: ClassVar[str] = "ecsq"

    def __post_init__(self) -> None:
        object.__setattr__(self, "bits", float(self.bits))
        if not LEAST_BITS <= self.bits <= MOST_BITS:
            raise RecipeError(f"ECSQ has {LEAST_BITS} to {MOST_BITS:g} bits, got {self.bits}")
        check_group_options(-1, self.scale_dtype)

    @property
    def block(self) -> int:
        return 1

    @property
    def code_bits(self) -> int:
        """Width of a code: eight times as many levels as the rate would fill, at most 256."""
        return min(int(np.ceil(self.bits)) + 3, 8)

    def most_coded_bytes(self, shape: tuple[int, int]) -> int:
        """bits * m n / 8, and the header of the stream."""
        count = shape[0] * shape[1]
        return int(self.bits * count / 8) + header_bytes(1 << self.code_bits, count)

    def fit(self, W: Tensor, *, importance: Tensor | None = None, gain: float = 1.0) -> FittedECSQ:
        """Scale and levels for W (m, n), rounded as stored; importance changes nothing.

        `gain` multiplies the scale, which lowers the rate by log2(gain) bits or so.

        Raises:
            ShapeError, NumericalError: W is not a finite matrix, or its scale does not fit
                `scale_dtype` (see `groups.round_scales`).

        Cost: three passes over W, then about five values of lambda on at most 2^20 bins.
        """
        from convex_caldera.quantizers.scalar_levels import sorted_points

        check_matrix(W, importance, gain)
        natural = natural_scales(W, -1, "rms")
        scale = round_scales(natural, self.scale_dtype)
        points = sorted_points(W, scale, -1, None)
        levels, bounds = entropy_constrained(points, _RATE_SHARE * self.bits, 1 << self.code_bits)
        spare = (1 << self.code_bits) - levels.size
        stored = torch.from_numpy(np.append(levels, np.full(spare, levels[-1])))
        return FittedECSQ(
            self,
            (W.shape[0], W.shape[1]),
            scale if gain == 1.0 else round_scales(natural * gain, self.scale_dtype),
            stored.to(SCALE_DTYPES[self.scale_dtype]).to(W.device),
            torch.from_numpy(bounds).float(),
        )

    def layout(self, shape: tuple[int, int]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """One scale, the levels, and codes before entropy coding."""
        dtype = SCALE_DTYPES[self.scale_dtype]
        return {
            "scales": (dtype, (1, 1)),
            "levels": (dtype, (1 << self.code_bits,)),
            "codes": (torch.uint8, (packed_bytes(shape[0] * shape[1], self.code_bits),)),
        }

    def restore(self, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> FittedECSQ:
        """From `FittedECSQ.tensors()`; FormatError if shape or type differ."""
        dtype = SCALE_DTYPES[self.scale_dtype]
        scale = checked_tensor(tensors, "scales", (1, 1), dtype)
        levels = checked_tensor(tensors, "levels", (1 << self.code_bits,), dtype)
        return FittedECSQ(self, shape, scale, levels)


@dataclass(frozen=True, eq=False)
class FittedECSQ(OneScaled):
    """ECSQ with its levels, ascending, the last repeated where fewer are used. Codes (m, n) uint8.

    `bounds` between the cells of levels used are not stored: a restored quantizer encodes to the
    nearest level.
    """

    quantizer: ECSQ
    shape: tuple[int, int]
    scales: Tensor
    levels: Tensor
    bounds: Tensor | None = None

    @property
    def code_bits(self) -> int:
        return self.quantizer.code_bits

    def encode(self, x: Tensor, start: int = 0) -> Tensor:
        """Codes (m, d) of the cells that columns start .. start + d lie in."""
        check_columns(x, self.shape, start, 1)
        check_finite(x, "the matrix to encode")
        bounds = self._bounds.to(x.device)
        scale = float(self.scales)
        divisor = scale if scale > 0 else float("inf")
        step = max(1, _CHUNK // x.shape[1])
        codes = [
            torch.bucketize(rows.float() / divisor, bounds, out_int32=True).to(torch.uint8)
            for rows in x.split(step)
        ]
        return torch.cat(codes)

    def decode(self, codes: Tensor, start: int = 0) -> Tensor:
        """Values (m, d), float32: level * scale."""
        check_codes(codes, self.levels.numel())
        return self.levels.to(codes.device).float()[codes.long()] * self.scales.float().to(
            codes.device
        )

    def round_panel(
        self, target: Tensor, base: Tensor, coupling: Tensor, start: int
    ) -> tuple[Tensor, Tensor]:
        """Codes and values of a run of columns with feedback (`core.protocols.RoundsPanels`)."""
        from convex_caldera.quantizers.scalar_panel_kernels import round_panel

        check_columns(target, self.shape, start, 1)
        goal = target.contiguous().numpy().copy()
        codes, values = round_panel(
            goal,
            base.contiguous().numpy(),
            coupling.contiguous().numpy(),
            np.float32(self.scales.item()),
            self._bounds.contiguous().numpy(),
            self.levels.float().numpy(),
        )
        check_finite(torch.from_numpy(goal), "what the feedback made of the matrix")
        return torch.from_numpy(codes), torch.from_numpy(values)

    @property
    def _bounds(self) -> Tensor:
        """Between the cells, or halfway between levels where the cells are not known."""
        levels = self.levels.float()
        return (levels[1:] + levels[:-1]) / 2 if self.bounds is None else self.bounds

    def tensors(self) -> dict[str, Tensor]:
        return {"scales": self.scales, "levels": self.levels}


def entropy_constrained(points: object, rate: float, most: int) -> tuple[Floats, Floats]:
    """(levels, bounds between their cells) of least error with at most `rate` bits of entropy.

    Args:
        points: `scalar_levels.Points`; masses are counts.
        rate: bits per number, above 0.
        most: levels at most.

    lambda is the least that keeps the rate; at high rates it is 2 ln 2 times the error.
    """
    from convex_caldera.quantizers.scalar_levels import Points

    assert isinstance(points, Points)
    problem = _Problem(points, most)

    def solve(x: float, lower: Priced | None) -> Priced:
        return problem.solve(2.0**x)

    guess = log_price(problem.variance, rate, 1)
    found = code_within(solve, rate, 1, guess, _RATE_TOLERANCE * rate)
    return found.levels, found.bounds


@dataclass(frozen=True, eq=False)
class Priced:
    """Levels, bounds between their cells, and the entropy of the codes."""

    levels: Floats
    bounds: Floats
    rate: float


class _Problem:
    """One set of points under several prices of a bit."""

    def __init__(self, points: object, most: int):
        from convex_caldera.quantizers.scalar_levels import Points

        assert isinstance(points, Points)
        self.points, self.most = points, most
        self.mass, self.first, self.second = points.prefix_sums()
        mean = self.first[-1] / self.mass[-1]
        self.variance = max(self.second[-1] / self.mass[-1] - mean**2, 1e-30)

    def solve(self, price: float) -> Priced:
        """The code under a price of a bit where alternation of cells and levels ends."""
        levels = self._start(price)
        lengths = np.zeros(levels.size)
        last = np.inf
        for _ in range(_STEPS):
            levels, lengths, bounds = _cells(levels, lengths, price)
            ends = np.searchsorted(self.points.values, bounds)
            ends = np.concatenate([[0], ends, [self.points.values.size]])
            w, s = np.diff(self.mass[ends]), np.diff(self.first[ends])
            used = w > 0
            share = w[used] / self.mass[-1]
            levels, lengths = s[used] / w[used], -np.log2(share)
            rate = float((share * lengths).sum())
            error = float(self.second[-1] - (s[used] ** 2 / w[used]).sum()) / self.mass[-1]
            cost = error + price * rate
            if last - cost <= _TOLERANCE * abs(cost):
                break
            last = cost
        levels, lengths, bounds = _cells(levels, lengths, price)
        ends = np.searchsorted(self.points.values, bounds)
        share = np.diff(self.mass[np.concatenate([[0], ends, [self.points.values.size]])])
        share = share[share > 0] / self.mass[-1]
        return Priced(levels, bounds, float(-(share * np.log2(share)).sum()))

    def _start(self, price: float) -> Floats:
        """Means of evenly fine cells; the best levels where those would be too many.

        At high rates cells of width d have error d^2 / 12, whose slope is -ln 2 d^2 / 6 a bit.
        """
        width = np.sqrt(6 * price / np.log(2))
        cell = np.floor(self.points.values / width + 0.5)
        starts = np.flatnonzero(np.diff(cell, prepend=np.nan) != 0)
        if starts.size > self.most:
            return self._best
        ends = np.append(starts, cell.size)
        return np.diff(self.first[ends]) / np.diff(self.mass[ends])

    @cached_property
    def _best(self) -> Floats:
        from convex_caldera.quantizers.scalar_levels import best_levels

        return np.unique(best_levels(self.points, self.most, 20))


def _cells(levels: Floats, lengths: Floats, price: float) -> tuple[Floats, Floats, Floats]:
    """(levels, lengths, bounds) without the levels that are nowhere the cheapest.

    (x - a)^2 + p and (x - b)^2 + q cross at (a + b) / 2 + (q - p) / (2 (b - a)).
    """
    while True:
        bounds = (levels[1:] + levels[:-1]) / 2 + price * np.diff(lengths) / (2 * np.diff(levels))
        empty = np.flatnonzero(np.diff(bounds) <= 0)
        if not empty.size:
            return levels, lengths, bounds
        # of a run of crossings out of order the worst level goes first
        worst = empty[np.argmin(np.diff(bounds)[empty])] + 1
        levels, lengths = np.delete(levels, worst), np.delete(lengths, worst)
