"""Trellis codes alone, and the menu that convex allocation chooses from.

    qtip             hadamard | Quantize(Trellis, full)
    convex-caldera   hadamard | [FitLowRank(r, identity, coded);] Quantize(Trellis, full)

Rates come in sixteenths of a bit, so that a budget is met by rates, not by mixing formats.

The low-rank term is the SVD of W itself, not of W under H. After a Hadamard transform and with
feedback the loss of rounding is D(b) |W - L R|_F^2 / (m n) times a constant of the layer's metric,
whatever the metric: what a rank is worth is the energy that it takes out of W. Everything that
the factors miss, their own rounding included, is part of the residual and so is coded at b bits;
hence coarse factors of a high rank beat fine ones of a low rank at equal bytes
(benchmarks/low_rank.py).
"""

from __future__ import annotations

import functools

import numpy as np

from convex_caldera.core.recipe import FactorCoding, FitLowRank, Quantize, Recipe, Step
from convex_caldera.quantizers.trellis import Trellis
from convex_caldera.recipes.ladder import Shape, Wishes
from convex_caldera.transforms.hadamard import RandomizedHadamard

LEAST_BITS, MOST_BITS, BIT_STEP = 1.0, 8.0, 1 / 16
# 2^12 states: a menu is measured option by option, and 2^14 would cost 2.3 times the time for
# 4 % less distortion.
STATE_BITS = 12
# Where the plan's layers are fitted again anyway, what only decides on the plan is searched with
# 2^10: a third of the time for some 5 % more distortion, known beforehand by the rate.
MEASURING_STATE_BITS = 10
# Rates, and the distortion of N(0, 1) with 2^12 states over that with 2^10
# (benchmarks/trellis_design.py --trial).
_TRIAL_RATES = (1, 1.5, 2, 2.5, 3, 3.375, 3.5, 3.875, 4, 4.5, 5, 5.5, 6, 6.375, 6.5, 7, 7.5, 8)
_OF_TRIAL = (
    0.985, 0.970, 0.964, 0.950, 0.954, 0.950, 0.941, 0.925, 0.934, 0.918, 0.917, 0.909, 0.928,
    0.931, 0.924, 0.914, 0.839, 0.840,
)  # fmt: skip
# The factors' own rate, and the least-squares refits that they are rounded after.
FACTOR_BITS, FACTOR_ITERATIONS = 2, 2
# Ranks on offer: multiples of a tile, and some below it; none whose factors cost more than this
# many bits per weight.
SMALL_RANKS, RANK_STEP, MOST_FACTOR_BITS = (4, 8), 16, 1.0


@functools.lru_cache(maxsize=4096, typed=True)
def trellis_recipe(bits: float, state_bits: int = STATE_BITS) -> Recipe:
    """Incoherence processing, then LDLQ with a bit-shift trellis, without fine-tuning.

    Source: Tseng et al., QTIP, arXiv 2406.11235.
    """
    return Recipe(
        (Quantize(Trellis(bits, state_bits), "full"),), transforms=(RandomizedHadamard(),)
    )


@functools.lru_cache(maxsize=4096, typed=True)
def convex_caldera_recipe(
    bits: float, rank: int = 0, factor_bits: int = FACTOR_BITS, state_bits: int = STATE_BITS
) -> Recipe:
    """One option of the menu: a trellis at `bits`, and a low-rank term if rank > 0."""
    if rank == 0:
        return trellis_recipe(bits, state_bits)
    coding = _coding(factor_bits, state_bits)
    steps: tuple[Step, ...] = (
        FitLowRank(rank, "identity", coding),
        Quantize(Trellis(bits, state_bits), "full"),
    )
    return Recipe(steps, transforms=(RandomizedHadamard(),))


def expected_of_trial(bits: float) -> float:
    """Loss with `STATE_BITS` over that with `MEASURING_STATE_BITS`, at a rate in bits a weight.

    All that factors miss is coded by the same trellis, so that the ratio is that of its
    distortions, whatever the rank.
    """
    return float(np.interp(bits, _TRIAL_RATES, _OF_TRIAL))


def _coding(factor_bits: int, state_bits: int) -> FactorCoding | None:
    if factor_bits == 16:
        return None
    return FactorCoding(Trellis(float(factor_bits), state_bits), FACTOR_ITERATIONS)


def rates(least: float = LEAST_BITS, most: float = MOST_BITS) -> tuple[float, ...]:
    """The code rates on offer, in sixteenths of a bit."""
    first, last = round(least / BIT_STEP), round(most / BIT_STEP)
    return tuple(i * BIT_STEP for i in range(first, last + 1))


def menu_ranks(shape: Shape, factor_bits: int = FACTOR_BITS) -> tuple[int, ...]:
    """Rank 0 and ranks whose factors cost at most `MOST_FACTOR_BITS` bits per weight.

    At most some thirty: in a wide matrix they are sixteen times a growing number apart.
    """
    m, n = shape
    most = min(int(MOST_FACTOR_BITS * m * n / (factor_bits * (m + n))), min(m, n) // 2)
    step = RANK_STEP * max(1, round(most / (32 * RANK_STEP)))
    return (0, *(r for r in SMALL_RANKS if r <= most), *range(step, most + 1, step))


def trellis_ladder(shape: Shape, wishes: Wishes) -> tuple[Recipe, ...]:
    del shape
    return tuple(trellis_recipe(bits) for bits in _bits(wishes))


def convex_caldera_ladder(shape: Shape, wishes: Wishes) -> tuple[Recipe, ...]:
    """Rates at one fixed rank: what a dry run plans with before anything is measured."""
    rank = min(wishes.rank or 0, *shape)
    return tuple(convex_caldera_recipe(bits, rank, wishes.factor_bits) for bits in _bits(wishes))


def _bits(wishes: Wishes) -> tuple[float, ...]:
    return rates() if wishes.bits is None else (wishes.bits,)
