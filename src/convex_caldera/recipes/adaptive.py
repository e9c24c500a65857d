"""ReALLM as promised: every matrix gets the latent that suits it, by measured rate and loss.

The menu of a matrix holds codebooks of several rates, with and without sorted strips, NormalFloat
levels, and autoencoders with full and with halved embeddings, each beside the same low rank. Which
one a matrix gets is decided for the whole model under its byte budget (`workflow`).
"""

from __future__ import annotations

from dataclasses import replace

from convex_caldera.core.recipe import Quantize, Recipe
from convex_caldera.quantizers.neural import Neural
from convex_caldera.recipes.autoencoder import parse_options, reallm_ae_recipe
from convex_caldera.recipes.ladder import Shape, Wishes
from convex_caldera.recipes.reallm import (
    DEFAULT_BUCKET,
    GROUP_SIZE,
    MOST_CODE_BITS,
    NORMAL_FLOAT_BITS,
    reallm_vq_recipe,
)

# Code rates on offer, relative to the budget's bits per weight: scales take an eighth, tables more.
ABOVE, BELOW = 0.6, 1.3


def reallm_menu(shape: Shape, wishes: Wishes, target: float | None = None) -> dict[str, Recipe]:
    """Options by label; near `target` bits per weight if one is given, and always the cheapest.

    Labels name the latent and its code bits: "vq 2", "strip 2", "nf 3", "ae 3" (an embedding
    value for every weight) and "ae half 2" (one for two weights, of twice the bits).
    """
    rank = min(wishes.rank or 0, *shape)
    group_size = GROUP_SIZE if wishes.group_size is None else wishes.group_size
    bucket = wishes.bucket or DEFAULT_BUCKET
    rates = [code / bucket for code in range(bucket, MOST_CODE_BITS[bucket] + 1)]
    options = parse_options(wishes.neural)
    found: dict[str, Recipe] = {}

    def offered(bits: float) -> bool:
        if wishes.bits is not None:
            return bits == wishes.bits
        return target is None or target - BELOW <= bits <= target + ABOVE

    def vq(bits: float, latent: str = "vq", order: str = "none") -> Recipe:
        return reallm_vq_recipe(
            bits, rank, bucket, latent, order, wishes.factor_bits, group_size=group_size
        )

    for bits in rates:
        if offered(bits) or (wishes.bits is None and bits == rates[0]):
            found[f"vq {bits:g}"] = vq(bits)
        if offered(bits) and offered(bits + 0.5) and bits % 1 == 0:
            found[f"strip {bits:g}"] = vq(bits, order="strip")
    for whole in range(1, 9):
        neural = options.neural(shape, whole)
        if whole in NORMAL_FLOAT_BITS and offered(whole):
            found[f"nf {whole}"] = vq(whole, latent="nf")
        if offered(neural.bits):
            found[f"ae {whole}"] = _private(neural, rank, wishes, group_size)
        half = replace(neural, channels=max(neural.channels // 2, 1))
        if whole % 2 == 0 and offered(half.bits):
            found[f"ae half {half.bits:g}"] = _private(half, rank, wishes, group_size)
    return found


def reallm_ladder(shape: Shape, wishes: Wishes) -> tuple[Recipe, ...]:
    """What a dry run plans with before anything is measured: every option."""
    return tuple(reallm_menu(shape, wishes).values())


def _private(neural: Neural, rank: int, wishes: Wishes, group_size: int) -> Recipe:
    """An autoencoder of one matrix, at fixed width: sizes must be known before they are chosen."""
    recipe = reallm_ae_recipe(neural, rank, wishes.factor_bits, group_size)
    steps = tuple(
        replace(step, coder=None) if isinstance(step, Quantize) else step for step in recipe.steps
    )
    return replace(recipe, steps=steps, sweeps=1)
