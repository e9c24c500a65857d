"""Quantize, then reconstruct the error by low rank: the LQER family is one sentence, four metrics.

no-lqer       Quantize(q, identity)
lqer          Quantize(q, identity); FitLowRank(r, identity)      SVD of the error
l2qer         Quantize(q, identity); FitLowRank(r, mean_abs)      under diag(E|x|)^2
qera-approx   Quantize(q, identity); FitLowRank(r, diagonal)      under diag(E[x^2])
qera-exact    Quantize(q, identity); FitLowRank(r, full)          under E[x x^T]

q is any scalar format (MXINT, affine or symmetric integers, NF, minifloats), factors have their
own (MXINT8). No damping: the best low-rank term needs no inverse, so channels that are zero on
all tokens are simply not served. Where factors are coded, one step of least squares against the
coded other factor makes up for its rounding, which the papers' codes do not do.

Sources: Zhang et al., LQER, arXiv 2402.02446; Zhang et al., QERA, arXiv 2410.06040; the SVD alone
is LoRC of ZeroQuant-V2, arXiv 2303.08302.
"""

from __future__ import annotations

from convex_caldera.core.protocols import Quantizer
from convex_caldera.core.recipe import FactorCoding, FitLowRank, Metric, Quantize, Recipe, Step
from convex_caldera.quantizers.mxint import MXInt
from convex_caldera.recipes.formats import factor_quantizer, parse_format
from convex_caldera.recipes.ladder import Shape, Wishes

DEFAULT_RANK = 32
DEFAULT_FORMAT = "mxint"
FACTOR_FORMAT = "mxint8/32"
FACTORS = MXInt(8, 32)
# At 2 bits an exponent for every 32 weights is a ninth of the file; rank is the better buy.
COARSE_BITS, COARSE_GROUP = 2, 64
# A ladder has at most about so many ranks per width.
RANKS = 64


def no_lqer_recipe(quantizer: Quantizer) -> Recipe:
    """Rounding to nearest alone: what the low-rank term is measured against."""
    return Recipe((Quantize(quantizer, "identity"),), damping=0.0)


def lqer_recipe(
    quantizer: Quantizer, rank: int = DEFAULT_RANK, factors: Quantizer | None = FACTORS
) -> Recipe:
    """The rounding error's truncated SVD (LQER; ZeroQuant-V2's LoRC). `factors` None: float16."""
    return error_reconstruction(quantizer, rank, "identity", factors)


def l2qer_recipe(
    quantizer: Quantizer, rank: int = DEFAULT_RANK, factors: Quantizer | None = FACTORS
) -> Recipe:
    """The SVD of the error scaled by E|x_j|, a mean over tokens, unclamped.

    The paper's code takes the largest batch mean, clamps it and divides by a constant: that
    constant changes nothing (scale invariance), the largest depends on the batch size.
    """
    return error_reconstruction(quantizer, rank, "mean_abs", factors)


def qera_approx_recipe(
    quantizer: Quantizer, rank: int = DEFAULT_RANK, factors: Quantizer | None = FACTORS
) -> Recipe:
    """The SVD of the error scaled by sqrt(E[x_j^2]): optimal for uncorrelated inputs."""
    return error_reconstruction(quantizer, rank, "diagonal", factors)


def qera_exact_recipe(
    quantizer: Quantizer, rank: int = DEFAULT_RANK, factors: Quantizer | None = FACTORS
) -> Recipe:
    """The rank-constrained regression: no term of that rank has less output error."""
    return error_reconstruction(quantizer, rank, "full", factors)


def error_reconstruction(
    quantizer: Quantizer, rank: int, metric: Metric, factors: Quantizer | None
) -> Recipe:
    """Round to nearest, then the best low-rank term for what is left, under one metric."""
    coding = None if factors is None else FactorCoding(factors, iterations=1, feedback=False)
    low_rank: tuple[Step, ...] = (FitLowRank(rank, metric, coding),) if rank else ()
    return Recipe((Quantize(quantizer, "identity"), *low_rank), damping=0.0)


def no_lqer_ladder(shape: Shape, wishes: Wishes) -> tuple[Recipe, ...]:
    del shape
    return tuple(
        no_lqer_recipe(quantizer)
        for bits in _widths(wishes)
        for quantizer in _quantizers(bits, wishes, (128, 64, 32, 16))
    )


def lqer_ladder(shape: Shape, wishes: Wishes) -> tuple[Recipe, ...]:
    return _ladder(shape, wishes, "identity")


def l2qer_ladder(shape: Shape, wishes: Wishes) -> tuple[Recipe, ...]:
    return _ladder(shape, wishes, "mean_abs")


def qera_approx_ladder(shape: Shape, wishes: Wishes) -> tuple[Recipe, ...]:
    return _ladder(shape, wishes, "diagonal")


def qera_exact_ladder(shape: Shape, wishes: Wishes) -> tuple[Recipe, ...]:
    return _ladder(shape, wishes, "full")


def _ladder(shape: Shape, wishes: Wishes, metric: Metric) -> tuple[Recipe, ...]:
    """At each width ranks from 0 up to where the next width would cost the same."""
    factors = factor_quantizer(wishes.factor_format or FACTOR_FORMAT)
    return tuple(
        error_reconstruction(quantizer, rank, metric, factors)
        for bits in _widths(wishes)
        for quantizer in _quantizers(bits, wishes, (None,))
        for rank in _ranks(shape, wishes, 16 if factors is None else getattr(factors, "bits", 8))
    )


def _widths(wishes: Wishes) -> tuple[int, ...]:
    offered = parse_format(wishes.format or DEFAULT_FORMAT).widths
    return offered if wishes.bits is None else (int(wishes.bits),)


def _quantizers(bits: int, wishes: Wishes, groups: tuple[int | None, ...]) -> tuple[Quantizer, ...]:
    """One per group size on offer; a group that the user gave leaves one."""
    parsed = parse_format(wishes.format or DEFAULT_FORMAT)
    given = wishes.group_size if wishes.group_size is not None else parsed.group_size
    if given is not None:
        return (parsed.quantizer(bits, given),)
    coarse = parsed.family == "mxint" and bits <= COARSE_BITS
    return tuple(
        parsed.quantizer(bits, COARSE_GROUP if group is None and coarse else group)
        for group in groups
    )


def _ranks(shape: Shape, wishes: Wishes, factor_bits: int) -> tuple[int, ...]:
    """0, then ranks whose factors take less than one bit per weight."""
    m, n = shape
    if wishes.rank is not None:
        return (min(wishes.rank, m, n),)
    most = min(int(m * n / ((factor_bits + 0.5) * (m + n))), m, n)
    return tuple(range(0, max(most, 1), max(1, most // RANKS)))
