"""QuIP# and CALDERA: randomised Hadamard, E8 lattice, LDLQ, and a coded low-rank term.

quip-sharp   hadamard | Quantize(E8P, full)
caldera      hadamard | FitLowRank(r, full, coded factors); Quantize(E8P, full)   x sweeps
"""

from __future__ import annotations

from convex_caldera.core.recipe import FactorCoding, FitLowRank, Quantize, Recipe
from convex_caldera.quantizers.e8p import E8P
from convex_caldera.recipes.ladder import Shape, Wishes
from convex_caldera.transforms.hadamard import RandomizedHadamard

LATTICE_BITS = (2, 3, 4)
# Refinement sweeps after LDLQ; the first buys most of the gain (QuIP# uses 10).
REFINEMENT_SWEEPS = 2
# Alternations of low rank and codes; the best state is kept.
CALDERA_SWEEPS = 6
# The most code bits at which the down-dated Hessian lowers the error.
DOWNDATE_BITS = 2


def quip_sharp_recipe(bits: int = 2, refinement: int = REFINEMENT_SWEEPS) -> Recipe:
    """QuIP# without fine-tuning: incoherence processing, then block LDLQ with E8P.

    Source: Tseng et al., QuIP#, arXiv 2402.04396.
    """
    return Recipe(
        (Quantize(E8P(bits), "full", sweeps=refinement),), transforms=(RandomizedHadamard(),)
    )


def caldera_recipe(
    bits: int = 2,
    rank: int = 64,
    factor_bits: int = 4,
    sweeps: int = CALDERA_SWEEPS,
    refinement: int = REFINEMENT_SWEEPS,
    downdate: bool | None = None,
) -> Recipe:
    """CALDERA: W ~ Q + L R with all three coded, alternated, best state kept.

    Rank 0 is exactly QuIP#. `downdate` is on at 2 bits and off above unless stated: the state it
    leads to keeps the rounding error of the factors, which is small beside 2-bit codes and large
    beside 3-bit ones (relative error on the acceptance case, rank 16, without and with: .177 and
    .164 at 2 bits, .097 and .103 at 3, .053 and .074 at 4).

    Source: Saha et al., CALDERA, arXiv 2405.18886; the order "low rank first" and the down-dated
    Hessian are those of the authors' code.
    """
    if rank == 0:
        return quip_sharp_recipe(bits, refinement)
    coding = None if factor_bits == 16 else FactorCoding(E8P(factor_bits))
    return Recipe(
        (
            FitLowRank(rank, "full", coding),
            Quantize(
                E8P(bits),
                "full",
                sweeps=refinement,
                downdate=bits <= DOWNDATE_BITS if downdate is None else downdate,
            ),
        ),
        transforms=(RandomizedHadamard(),),
        sweeps=sweeps,
    )


def quip_sharp_ladder(shape: Shape, wishes: Wishes) -> tuple[Recipe, ...]:
    return tuple(quip_sharp_recipe(bits) for bits in _bits(wishes))


def caldera_ladder(shape: Shape, wishes: Wishes) -> tuple[Recipe, ...]:
    """At each bit width ranks from 0 up to where the next width would cost the same."""
    return tuple(
        caldera_recipe(bits, rank, wishes.factor_bits)
        for bits in _bits(wishes)
        for rank in _ranks(shape, wishes)
    )


def _bits(wishes: Wishes) -> tuple[int, ...]:
    return LATTICE_BITS if wishes.bits is None else (int(wishes.bits),)


def _ranks(shape: Shape, wishes: Wishes) -> tuple[int, ...]:
    """0, then every rank whose coded factors take less than one bit per weight."""
    if wishes.rank is not None:
        return (min(wishes.rank, *shape),)
    m, n = shape
    most = int(m * n / (wishes.factor_bits * (m + n)))
    step = max(1, min(m, n) // 256)
    return tuple(range(0, max(most, 1), step))
