"""Ladders: the recipes of one method for one matrix, cheapest first.

A budget is met by choosing one rung per layer (`workflow.fill`); a method is thus a family of
recipes ordered by stored size, and any budget between two rungs is met by mixing layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from convex_caldera.core.recipe import Recipe
from convex_caldera.errors import RecipeError

Shape = tuple[int, int]


@dataclass(frozen=True)
class Wishes:
    """What a user may fix; None leaves the choice to the method's ladder.

    Args:
        rank: of the low-rank term, for methods that have one.
        factor_bits: bits of the factors' entries, 2 to 4 (coded) or 16 (float16).
        group_size: weights sharing a scale, for scalar quantizers; 0 is a whole row.
        bits: code bits of the quantizer, to pin one rung.
        format, factor_format: names of number formats (`recipes.formats`), for methods that take
            any scalar format.
        bucket, latent, order: vector length, kind of latent code and order of columns (ReALLM).
        code_bits: bits of one code, that of a weight or of a block of them.
        block_size: columns of a coded block (vector quantization).
        num_iters, sample_size: of fitting a codebook.
        clip_ratio: part of the weights that a uniform range covers.
        neural: options of an autoencoder, each "name=value" (`recipes.autoencoder`).
    """

    rank: int | None = None
    factor_bits: int = 4
    group_size: int | None = None
    bits: float | None = None
    format: str | None = None
    factor_format: str | None = None
    bucket: int | None = None
    latent: str | None = None
    order: str | None = None
    neural: tuple[str, ...] = ()
    code_bits: int | None = None
    block_size: int | None = None
    num_iters: int | None = None
    sample_size: int | None = None
    clip_ratio: float | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 0:
            raise RecipeError(f"rank must be >= 0, got {self.rank}")
        if self.factor_bits not in (2, 3, 4, 16):
            raise RecipeError(f"factor bits must be 2, 3, 4 or 16, got {self.factor_bits}")


@dataclass(frozen=True)
class Method:
    """A named method: one sentence, its paper, and its ladder of recipes for a shape (m, n).

    `curvature` is what its rounding is meant to see, `shrinkage` how that is smoothed, `targets`
    what is rounded; `factor_bits` codes its factors unless the user asks for others; `allocates`
    says that bits and ranks are decided together for the whole
    model instead of uniformly. `menu` gives options by label, near a target in bits per weight,
    which all are measured; `share` lets layers share what is trained for several of them, given
    all recipes and the options of `Wishes.neural`.
    """

    name: str
    sentence: str
    paper: str
    ladder: Callable[[Shape, Wishes], tuple[Recipe, ...]]
    curvature: Literal["none", "input", "kronecker"] = "input"
    targets: Literal["original", "drift-corrected"] = "original"
    shrinkage: Literal["none", "held-out"] = "none"
    factor_bits: int = 4
    allocates: bool = False
    menu: Callable[[Shape, Wishes, float | None], Mapping[str, Recipe]] | None = None
    share: Callable[[Mapping[str, Recipe], tuple[str, ...]], dict[str, Recipe]] | None = None
