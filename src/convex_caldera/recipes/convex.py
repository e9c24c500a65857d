"""Trellis codes alone, and the menu that convex allocation chooses from.

    qtip             hadamard | Quantize(Trellis, full)
    convex-caldera   hadamard | [FitLowRank(r, full, coded);] Quantize(Trellis, full)

Rates come in sixteenths of a bit, so that a budget is met by rates, not by mixing formats.
"""

from __future__ import annotations

from convex_caldera.core.recipe import FactorCoding, FitLowRank, Quantize, Recipe, Step
from convex_caldera.quantizers.e8p import E8P
from convex_caldera.quantizers.trellis import Trellis
from convex_caldera.recipes.ladder import Shape, Wishes
from convex_caldera.recipes.lattice import DOWNDATE_BITS
from convex_caldera.transforms.hadamard import RandomizedHadamard

LEAST_BITS, MOST_BITS, BIT_STEP = 1.0, 8.0, 1 / 16
# 2^12 states: a menu is measured option by option, and 2^14 would cost 2.3 times the time for
# 4 % less distortion.
STATE_BITS = 12
# Alternations where there is a low-rank term; under a two-sided curvature the first two pay.
LOW_RANK_SWEEPS = 2
# A rank is offered where its factors cost about these many bits per weight.
RANK_COSTS = (0.05, 0.1, 0.2)


def trellis_recipe(bits: float) -> Recipe:
    """Incoherence processing, then LDLQ with a bit-shift trellis, without fine-tuning.

    Source: Tseng et al., QTIP, arXiv 2406.11235.
    """
    return Recipe(
        (Quantize(Trellis(bits, STATE_BITS), "full"),), transforms=(RandomizedHadamard(),)
    )


def convex_caldera_recipe(bits: float, rank: int = 0, factor_bits: int = 4) -> Recipe:
    """One option of the menu: a trellis at `bits`, and a low-rank term if rank > 0."""
    if rank == 0:
        return trellis_recipe(bits)
    coding = None if factor_bits == 16 else FactorCoding(E8P(factor_bits))
    steps: tuple[Step, ...] = (
        FitLowRank(rank, "full", coding),
        Quantize(Trellis(bits, STATE_BITS), "full", downdate=bits <= DOWNDATE_BITS),
    )
    return Recipe(steps, transforms=(RandomizedHadamard(),), sweeps=LOW_RANK_SWEEPS)


def rates(least: float = LEAST_BITS, most: float = MOST_BITS) -> tuple[float, ...]:
    """The code rates on offer, in sixteenths of a bit."""
    first, last = round(least / BIT_STEP), round(most / BIT_STEP)
    return tuple(i * BIT_STEP for i in range(first, last + 1))


def menu_ranks(shape: Shape, factor_bits: int = 4) -> tuple[int, ...]:
    """Rank 0 and the ranks whose factors cost about `RANK_COSTS` bits per weight."""
    m, n = shape
    per_rank = factor_bits * (m + n) / (m * n)
    ranks = {min(round(cost / per_rank), m, n) for cost in RANK_COSTS}
    return (0, *sorted(rank for rank in ranks if rank > 0))


def trellis_ladder(shape: Shape, wishes: Wishes) -> tuple[Recipe, ...]:
    del shape
    return tuple(trellis_recipe(bits) for bits in _bits(wishes))


def convex_caldera_ladder(shape: Shape, wishes: Wishes) -> tuple[Recipe, ...]:
    """Rates at one fixed rank: what a dry run plans with before anything is measured."""
    rank = min(wishes.rank or 0, *shape)
    return tuple(convex_caldera_recipe(bits, rank, wishes.factor_bits) for bits in _bits(wishes))


def _bits(wishes: Wishes) -> tuple[float, ...]:
    return rates() if wishes.bits is None else (wishes.bits,)
