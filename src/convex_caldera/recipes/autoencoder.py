"""ReALLM's other latent: embeddings of patches and a decoder that several matrices share.

reallm-ae   FitLowRank(r, full, coded); Quantize(DoubleScale(Neural), diagonal, rANS)

The options carry the names of the mission's command (`train_nerv_all.py`) and its meanings:
"enc_dim=64_16" is an encoder of 64 channels and embeddings of 16, "modelsize=7.2" a decoder that
has 7.2 million parameters together with the embeddings of one matrix.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from convex_caldera.coding.rans import Rans
from convex_caldera.core.recipe import FactorCoding, FitLowRank, Quantize, Recipe, Step
from convex_caldera.errors import RecipeError
from convex_caldera.quantizers.double_scale import DoubleScale
from convex_caldera.quantizers.e8p import E8P
from convex_caldera.quantizers.neural import Neural, neural_part, with_core
from convex_caldera.quantizers.neural_decoder import width_for
from convex_caldera.recipes.ladder import Shape, Wishes
from convex_caldera.recipes.reallm import DENSE_BITS, GROUP_SIZE, low_ranks

SHARES = ("all", "kind", "none")
ENCODERS = ("convnext",)
# HNeRV's name, and the one that the mission's command gives it.
DECODERS = ("quantpshuffel", "quantpshuffle")
EMBED_BITS = (1, 2, 3, 4, 5, 6, 7, 8)
# Alternations: with a decoder at hand the second one costs little and refits the factors.
SWEEPS = 2


@dataclass(frozen=True)
class AutoencoderOptions:
    """Options of an autoencoder by the mission's names; see `quantizers.neural.Neural`.

    Args:
        p_size: side of a patch.
        conv_type: encoder and decoder; ("convnext", "quantpshuffle") is what there is.
        enc_dim: "a_b": channels of the encoder and of an embedding; b below 1 is the share of
            `modelsize` that the embeddings take.
        enc_strds, dec_strds: strides of the stages.
        ks: "0_k1_k2": kernels of the decoder's first and last stage; the stem has kernel 1.
        lower_width: channels below which no stage of the decoder falls.
        modelsize: millions of parameters of decoder and embeddings of one matrix; sets the width.
        width: of the decoder, where no modelsize does.
        wbits: bits of a decoder weight.
        embed_bits: bits of an embedding value; all from 1 to 8 are offered unless given.
        epochs, lr, seed: of the training; refinements: of each embedding afterwards.
        sample: patches that a shared decoder is trained on at most.
        share: which matrices share a decoder: "all", those of one "kind", "none".

    Raises:
        RecipeError: an option out of range, or two that contradict each other.
    """

    p_size: int = 32
    conv_type: tuple[str, ...] = ("convnext", "quantpshuffle")
    enc_dim: str = "32_4"
    enc_strds: tuple[int, ...] = (2,)
    dec_strds: tuple[int, ...] = (2,)
    ks: str = "0_1_3"
    lower_width: int = 4
    modelsize: float | None = None
    width: int = 16
    wbits: int = 6
    embed_bits: int | None = None
    epochs: int = 10
    lr: float = 2e-3
    seed: int = 1
    refinements: int = 4
    sample: int = 512
    share: str = "all"

    def __post_init__(self) -> None:
        known = len(self.conv_type) == 2 and self.conv_type[0] in ENCODERS
        if not known or self.conv_type[1] not in DECODERS:
            raise RecipeError(
                f"conv_type is an encoder, {' or '.join(ENCODERS)}, and a decoder, "
                f"{' or '.join(DECODERS)}, got {self.conv_type}"
            )
        if self.share not in SHARES or self.sample < 1:
            raise RecipeError(
                f"share is one of {', '.join(SHARES)} and sample positive, got {self.share!r}, "
                f"{self.sample}"
            )
        if self.modelsize is not None and not self.modelsize > 0:
            raise RecipeError(f"modelsize is in millions and positive, got {self.modelsize}")

    def neural(self, shape: Shape, embed_bits: int) -> Neural:
        """The code for a matrix of this shape."""
        first, last = self._kernels()
        width, share = self._dimensions()
        size = math.prod(self.enc_strds)
        if self.p_size % size:
            raise RecipeError(f"p_size {self.p_size} is no multiple of the strides' product {size}")
        places = (self.p_size // size) ** 2
        plain = Neural(
            self.p_size, 1, self.enc_strds, self.dec_strds, self.width, (first, last),
            self.lower_width, self.wbits, embed_bits, "", width, self.epochs, self.lr, self.seed,
            self.refinements,
        )  # fmt: skip
        count = plain.patches(shape)
        channels = int(share)
        if share < 1:
            channels = max(int(share * self._parameters() / (count * places)), 1)
        coded = replace(plain, channels=channels)
        if self.modelsize is None:
            return coded
        left = self._parameters() - count * places * channels
        return replace(coded, width=width_for(left, coded.geometry))

    def _parameters(self) -> int:
        if self.modelsize is None:
            raise RecipeError("enc_dim gives a share of modelsize, which is not given")
        return int(self.modelsize * 1e6)

    def _kernels(self) -> tuple[int, int]:
        parts = self.ks.split("_")
        if len(parts) != 3 or parts[0] != "0" or not all(part.isdigit() for part in parts):
            raise RecipeError(f"ks reads 0_first_last such as 0_1_5, got {self.ks!r}")
        return int(parts[1]), int(parts[2])

    def _dimensions(self) -> tuple[int, float]:
        first, _, second = self.enc_dim.partition("_")
        try:
            width, channels = int(first), float(second)
        except ValueError:
            width, channels = 0, 0.0
        if width < 1 or channels <= 0 or (channels >= 1 and channels % 1):
            raise RecipeError(f"enc_dim reads width_channels such as 64_16, got {self.enc_dim!r}")
        return width, channels


def parse_options(texts: tuple[str, ...]) -> AutoencoderOptions:
    """Options of "name=value"; a list is written 2,2 or [2,2] or ['a', 'b'].

    Raises:
        RecipeError: an unknown or repeated name, or a value of another type.
    """
    known = {field.name: str(field.type) for field in fields(AutoencoderOptions)}
    values: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or name not in known or name in values:
            near = difflib.get_close_matches(name, known, n=2, cutoff=0.4) or sorted(known)
            raise RecipeError(
                f"autoencoder option {text!r} must read name=value, each name once; "
                f"did you mean {' or '.join(near)}?"
            )
        values[name] = _value(text, value, known[name])
    return AutoencoderOptions(**values)


def _value(text: str, value: str, kind: str) -> Any:
    parts = [part.strip().strip("'\"") for part in value.strip("[]() ").split(",")]
    try:
        if kind.startswith("tuple[int"):
            return tuple(int(part) for part in parts)
        if kind.startswith("tuple[str"):
            return tuple(parts)
        if kind.startswith("int"):
            return int(value)
        if kind.startswith("float"):
            return float(value)
    except ValueError as error:
        raise RecipeError(f"autoencoder option {text!r}: {value!r} is no {kind}") from error
    return value


def reallm_ae_recipe(
    neural: Neural, rank: int = 0, factor_bits: int = 4, group_size: int = GROUP_SIZE
) -> Recipe:
    """Low rank, then an autoencoder of what it leaves, embeddings entropy-coded.

    Source: Leconte et al., ReALLM, arXiv 2405.13155; Chen et al., HNeRV, arXiv 2304.02633.
    """
    codes = Quantize(DoubleScale(neural, group_size), "diagonal", coder=Rans(neural.embed_bits))
    if rank == 0:
        return Recipe((codes,))
    coding = None if factor_bits == DENSE_BITS else FactorCoding(E8P(factor_bits))
    steps: tuple[Step, ...] = (FitLowRank(rank, "full", coding), codes)
    return Recipe(steps, sweeps=SWEEPS)


def reallm_ae_ladder(shape: Shape, wishes: Wishes) -> tuple[Recipe, ...]:
    """Embedding bits 1 to 8 (all that are stored for a weight, with the decoder), and ranks."""
    options = parse_options(wishes.neural)
    group_size = GROUP_SIZE if wishes.group_size is None else wishes.group_size
    offered: tuple[int, ...] = EMBED_BITS if options.embed_bits is None else (options.embed_bits,)
    if wishes.bits is not None:
        if wishes.bits not in EMBED_BITS:
            raise RecipeError(f"embeddings have 1 to 8 bits, got {wishes.bits:g}")
        offered = (int(wishes.bits),)
    found = []
    for bits in offered:
        neural = options.neural(shape, bits)
        for rank in low_ranks(shape, wishes, neural.bits / bits):
            found.append(reallm_ae_recipe(neural, rank, wishes.factor_bits, group_size))
    return tuple(found)


def share_decoders(recipes: Mapping[str, Recipe], neural: tuple[str, ...]) -> dict[str, Recipe]:
    """The same recipes, with one decoder for all layers whose decoders are alike.

    The first layer of each group, in the order of `recipes`, stores it; the others name that one.
    """
    share = parse_options(neural).share
    homes: dict[tuple[Neural, str], str] = {}
    found = {}
    for name, recipe in recipes.items():
        core = core_of(recipe)
        # Embeddings may have other bits: what is shared does not depend on them.
        alike = replace(core, embed_bits=EMBED_BITS[-1])
        key = (alike, {"all": "", "kind": name.rpartition(".")[2], "none": name}[share])
        home = homes.setdefault(key, name)
        found[name] = with_recipe_core(recipe, replace(core, home="" if home == name else home))
    return found


def core_of(recipe: Recipe) -> Neural:
    """The neural code of a recipe; RecipeError if it has none."""
    for step in recipe.steps:
        if isinstance(step, Quantize):
            core = neural_part(step.quantizer)[1]
            if core is not None:
                return core
    raise RecipeError("the recipe has no neural codes")


def with_recipe_core(recipe: Recipe, core: Any) -> Recipe:
    """The recipe with another neural core in place of its own."""
    steps = tuple(
        replace(step, quantizer=with_core(step.quantizer, core))
        if isinstance(step, Quantize) and neural_part(step.quantizer)[1] is not None
        else step
        for step in recipe.steps
    )
    return replace(recipe, steps=steps)
