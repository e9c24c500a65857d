"""ReALLM: a low-rank term beside a latent code of the rest, vector-quantized or NormalFloat.

reallm-vq   FitLowRank(r, full, coded); Quantize(DoubleScale(KMeans | NormalFloat), full)  x sweeps
            with an order of columns by strips: Quantize(StripOrder(DoubleScale(..)), diagonal)

The latent has `bits` per weight in vectors of `bucket` columns, under scales of 64 weights that
are quantized themselves. No rotation: the method means to use the pattern of the weights.
"""

from __future__ import annotations

from convex_caldera.core.protocols import Quantizer
from convex_caldera.core.recipe import FactorCoding, FitLowRank, Metric, Quantize, Recipe, Step
from convex_caldera.errors import RecipeError
from convex_caldera.quantizers.double_scale import DoubleScale
from convex_caldera.quantizers.e8p import E8P
from convex_caldera.quantizers.kmeans import KMeans
from convex_caldera.quantizers.normal_float import NormalFloat
from convex_caldera.quantizers.strip_order import StripOrder
from convex_caldera.recipes.ladder import Shape, Wishes

BUCKETS = (1, 2, 4, 8)
DEFAULT_BUCKET = 2
LATENTS = ("vq", "nf")
ORDERS = ("none", "strip")
GROUP_SIZE = 64
# Alternations of low rank and codes; the best state is kept.
SWEEPS = 3
# Refinement sweeps after LDLQ.
REFINEMENT_SWEEPS = 2
# Lloyd's steps of a codebook (ReALLM's code).
CODEBOOK_ITERATIONS = 20
# The longest code of a vector on offer: 2^10 codewords of 8 columns already are 16 KiB.
MOST_CODE_BITS = {1: 8, 2: 8, 4: 10, 8: 10}
NORMAL_FLOAT_BITS = (2, 3, 4)
DENSE_BITS = 16


def reallm_vq_recipe(
    bits: float = 2,
    rank: int = 64,
    bucket: int = DEFAULT_BUCKET,
    latent: str = "vq",
    order: str = "none",
    factor_bits: int = 4,
    metric: Metric = "full",
    group_size: int = GROUP_SIZE,
) -> Recipe:
    """Low rank and latent codes in alternation, best state kept.

    Args:
        bits: code bits a weight; a multiple of 1 / bucket for "vq", 2 to 4 for "nf".
        rank: of the low-rank term; 0 leaves it out.
        bucket: columns of a vector, 1, 2, 4 or 8; NormalFloat codes them one by one.
        latent: "vq", a codebook fitted by weighted k-means, or "nf", NormalFloat levels.
        order: "strip" sorts the columns of every 64 rows; codes are then nearest.
        factor_bits: of the low-rank factors, 2 to 4, or 16.
        metric: what the steps see; "identity" is the paper's, which uses no data.
        group_size: weights that share a scale.

    Raises:
        RecipeError: an option out of range.

    Source: Leconte et al., ReALLM, arXiv 2405.13155, and its code; the alternation is that of
    LQ-LoRA, arXiv 2311.12023. Differs: steps see H, codes are fed back (LDLQ), the best state
    is kept instead of the one before the first rise, factors are coded unless 16 bits are asked.
    """
    quantizer: Quantizer = DoubleScale(_latent(bits, bucket, latent), group_size)
    if order == "strip":
        quantizer = StripOrder(quantizer)
    elif order != "none":
        raise RecipeError(f"order is one of {', '.join(ORDERS)}, got {order!r}")
    feedback = metric == "full" and order == "none"
    codes = Quantize(
        quantizer,
        "diagonal" if metric == "full" and not feedback else metric,
        sweeps=REFINEMENT_SWEEPS if feedback else 0,
    )
    if rank == 0:
        return Recipe((codes,))
    coding = None if factor_bits == DENSE_BITS else FactorCoding(E8P(factor_bits))
    steps: tuple[Step, ...] = (FitLowRank(rank, metric, coding), codes)
    return Recipe(steps, sweeps=SWEEPS)


def reallm_vq_ladder(shape: Shape, wishes: Wishes) -> tuple[Recipe, ...]:
    """Every code rate of the bucket, each with the ranks that cost less than the next one."""
    bucket = wishes.bucket or DEFAULT_BUCKET
    latent, order = wishes.latent or "vq", wishes.order or "none"
    if wishes.bucket is not None and latent == "nf":
        raise RecipeError("NormalFloat codes weights one by one; leave out bucket or choose vq")
    return tuple(
        reallm_vq_recipe(
            bits, rank, bucket, latent, order, wishes.factor_bits,
            group_size=GROUP_SIZE if wishes.group_size is None else wishes.group_size,
        )
        for bits in _rates(bucket, latent, wishes)
        for rank in low_ranks(shape, wishes, 1.0 if latent == "nf" else 1 / bucket)
    )  # fmt: skip


def low_ranks(shape: Shape, wishes: Wishes, room: float) -> tuple[int, ...]:
    """0 and every rank whose factors take less than `room` bits per weight, at most 16 of them."""
    if wishes.rank is not None:
        return (min(wishes.rank, *shape),)
    m, n = shape
    most = min(int(room * m * n / (wishes.factor_bits * (m + n))), m, n)
    return tuple(range(0, max(most, 1), max(1, -(-most // 16))))


def _latent(bits: float, bucket: int, latent: str) -> Quantizer:
    if latent == "nf":
        if bits not in NORMAL_FLOAT_BITS:
            raise RecipeError(f"the latent nf has 2, 3 or 4 bits, got {bits:g}")
        return NormalFloat(int(bits), -1)
    if latent != "vq":
        raise RecipeError(f"latent is one of {', '.join(LATENTS)}, got {latent!r}")
    if bucket not in BUCKETS:
        raise RecipeError(f"bucket is one of {', '.join(map(str, BUCKETS))}, got {bucket}")
    return KMeans(bits, bucket, -1, iterations=CODEBOOK_ITERATIONS)


def _rates(bucket: int, latent: str, wishes: Wishes) -> tuple[float, ...]:
    if wishes.bits is not None:
        return (wishes.bits,)
    if latent == "nf":
        return NORMAL_FLOAT_BITS
    if bucket not in MOST_CODE_BITS:
        raise RecipeError(f"bucket is one of {', '.join(map(str, BUCKETS))}, got {bucket}")
    return tuple(code / bucket for code in range(bucket, MOST_CODE_BITS[bucket] + 1))
