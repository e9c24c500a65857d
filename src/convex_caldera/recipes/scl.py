"""The source-coding baselines: scalar, Lloyd-Max and vector quantization, and entropy-coded ones.

scl-scalar-uniform   Quantize(ClippedUniform, diagonal)
scl-lloyd-max        Quantize(LloydMax, diagonal)
scl-vector-vq        Quantize(KMeans, diagonal)
scl-ecsq             Quantize(ECSQ, full, coder=rANS)
scl-ecvq             Quantize(ECVQ, full, coder=rANS)

The first three look at no data unless a curvature is asked for; codebooks are then weighted by
diag H. One range or codebook serves a matrix, as in the course projects they come from, and a
`group_size` gives every row or group a scale of its own. The last two round with feedback.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from convex_caldera.coding import Huffman, Rans
from convex_caldera.coding.symbols import symbol_bits
from convex_caldera.core.protocols import Quantizer
from convex_caldera.core.recipe import Quantize, Recipe, Step
from convex_caldera.errors import RecipeError
from convex_caldera.quantizers.clipped_uniform import ClippedUniform
from convex_caldera.quantizers.ecsq import ECSQ
from convex_caldera.quantizers.ecvq import ECVQ, LEAST_RATE, MOST_RATE
from convex_caldera.quantizers.groups import PER_TENSOR
from convex_caldera.quantizers.kmeans import MAX_CODE_BITS, KMeans
from convex_caldera.quantizers.lloyd_max import LloydMax
from convex_caldera.recipes.ladder import Shape, Wishes

CoderName = Literal["huffman", "rans"]
SCALAR_BITS = tuple(range(1, 9))
# Of scl-vector-vq where no block size is given: wider blocks as soon as the codebook is small.
BLOCK_SIZES = (1, 2, 4, 8)
BLOCK_SIZE = 4  # that of the mission's script, for a code width alone
# Part of the codes that a codebook may take before a narrower block is the better buy.
CODEBOOK_SHARE = 0.02
RATES = tuple(k / 8 for k in range(4, 49))
ECVQ_BLOCK_SIZE = 2


def scalar_uniform_recipe(
    bits: int = 8, group_size: int = PER_TENSOR, clip_ratio: float = 1.0
) -> Recipe:
    """Evenly spaced levels over the range, or the inner `clip_ratio`, of a matrix or group."""
    dtype = "float32" if group_size == PER_TENSOR else "float16"
    return _recipe(ClippedUniform(bits, group_size, clip_ratio, dtype))


def lloyd_max_recipe(
    bits: int = 8, group_size: int = PER_TENSOR, iterations: int = 100, sample_size: int = 0
) -> Recipe:
    """Levels of least squared error; from all weights unless a sample size is given."""
    return _recipe(LloydMax(bits, group_size, "rms", iterations, sample_size))


def vector_vq_recipe(
    bits: float = 2.0,
    block_size: int = BLOCK_SIZE,
    group_size: int = PER_TENSOR,
    iterations: int = 25,
    sample_size: int = 200_000,
) -> Recipe:
    """A k-means codebook for blocks of a row; bits are per weight."""
    return _recipe(KMeans(bits, block_size, group_size, "rms", iterations, sample_size))


def ecsq_recipe(bits: float = 2.0) -> Recipe:
    """Entropy-constrained levels under LDLQ, coded by rANS."""
    return with_coder(ECSQ(bits), "rans")


def ecvq_recipe(bits: float = 2.0, block_size: int = ECVQ_BLOCK_SIZE) -> Recipe:
    """Entropy-constrained codewords under LDLQ, coded by rANS."""
    return with_coder(ECVQ(bits, block_size), "rans")


def with_coder(quantizer: Quantizer, coder: CoderName) -> Recipe:
    """LDLQ with an entropy coder for the codes."""
    return Recipe((Quantize(quantizer, "full", coder=coder_for(quantizer, coder)),))


def coder_for(quantizer: Quantizer, name: CoderName) -> Huffman | Rans:
    """A coder whose symbols fit the quantizer's codes."""
    return (Rans if name == "rans" else Huffman)(symbol_bits(quantizer))


def entropy_coded(recipe: Recipe, name: CoderName) -> Recipe:
    """The same recipe with all codes beside low-rank factors coded by `name`."""

    def coded(step: Step) -> Step:
        if not isinstance(step, Quantize):
            return step
        return dataclasses.replace(step, coder=coder_for(step.quantizer, name))

    return dataclasses.replace(recipe, steps=tuple(coded(step) for step in recipe.steps))


# --- ladders --------------------------------------------------------------------------------


def scalar_uniform_ladder(shape: Shape, wishes: Wishes) -> tuple[Recipe, ...]:
    del shape
    clip_ratio = 1.0 if wishes.clip_ratio is None else wishes.clip_ratio
    return tuple(scalar_uniform_recipe(b, _group(wishes), clip_ratio) for b in _widths(wishes))


def lloyd_max_ladder(shape: Shape, wishes: Wishes) -> tuple[Recipe, ...]:
    """Widths whose levels are fewer than the weights."""
    options = (_group(wishes), wishes.num_iters or 100, wishes.sample_size or 0)
    fitting = [bits for bits in _widths(wishes) if 1 << bits <= math.prod(shape)]
    if not fitting:
        raise RecipeError(_too_large(1 << _widths(wishes)[0], 1, shape))
    return tuple(lloyd_max_recipe(bits, *options) for bits in fitting)


def vector_vq_ladder(shape: Shape, wishes: Wishes) -> tuple[Recipe, ...]:
    """Rates by rising size: at each the widest block whose codebook is small beside the codes.

    A block size that was given is kept, as long as there are as many blocks as codewords.
    """
    options = (_group(wishes), wishes.num_iters or 25, wishes.sample_size or 200_000)
    sizes = BLOCK_SIZES if wishes.block_size is None else (wishes.block_size,)
    if wishes.code_bits is not None:
        size = wishes.block_size or BLOCK_SIZE
        _check_codebook(wishes.code_bits, size, shape)
        return (vector_vq_recipe(wishes.code_bits / size, size, *options),)
    chosen: dict[float, int] = {}
    for size in sizes:
        for width in range(1, MAX_CODE_BITS + 1):
            share = (16 * size << width) / (width * math.prod(shape) / size)
            small = share <= CODEBOOK_SHARE or size == 1
            given = wishes.block_size is not None and 1 << width <= _blocks(size, shape)
            if (small or given) and width / size <= SCALAR_BITS[-1]:
                chosen[width / size] = size
    rates = sorted(chosen) if wishes.bits is None else [float(wishes.bits)]
    missing = [rate for rate in rates if rate not in chosen]
    if missing or not rates:
        raise RecipeError(
            f"no codebook of {missing[0] if missing else 'any'} bits per weight in blocks of "
            f"{', '.join(map(str, sizes))} suits a matrix {shape}; choose another block size"
        )
    return tuple(vector_vq_recipe(rate, chosen[rate], *options) for rate in rates)


def ecsq_ladder(shape: Shape, wishes: Wishes) -> tuple[Recipe, ...]:
    del shape
    return tuple(ecsq_recipe(rate) for rate in _rates(wishes))


def ecvq_ladder(shape: Shape, wishes: Wishes) -> tuple[Recipe, ...]:
    """Every rate, in blocks of two as far as their codes go and weight by weight beyond."""
    del shape
    sizes = (wishes.block_size,) if wishes.block_size else (ECVQ_BLOCK_SIZE, 1)
    fitting = [(rate, size) for rate in _rates(wishes) if (size := _first_block(rate, sizes))]
    if not fitting:
        raise RecipeError(
            f"blocks of {' or '.join(map(str, sizes))} have {LEAST_RATE:g} to {MOST_RATE:g} bits; "
            "choose other --bits or another --block-size"
        )
    options = {"iterations": wishes.num_iters, "sample_size": wishes.sample_size}
    given = {name: value for name, value in options.items() if value is not None}
    return tuple(with_coder(ECVQ(rate, size, **given), "rans") for rate, size in fitting)


def _first_block(rate: float, sizes: tuple[int, ...]) -> int | None:
    """The first block size whose codes have so many bits a weight."""
    return next((size for size in sizes if LEAST_RATE <= rate * size <= MOST_RATE), None)


def _recipe(quantizer: Quantizer) -> Recipe:
    return Recipe((Quantize(quantizer, "diagonal"),))


def _group(wishes: Wishes) -> int:
    return PER_TENSOR if wishes.group_size is None else wishes.group_size


def _widths(wishes: Wishes) -> tuple[int, ...]:
    if wishes.code_bits is not None:
        return (wishes.code_bits,)
    return SCALAR_BITS if wishes.bits is None else (int(wishes.bits),)


def _rates(wishes: Wishes) -> tuple[float, ...]:
    return RATES if wishes.bits is None else (float(wishes.bits),)


def _blocks(size: int, shape: Shape) -> int:
    return shape[0] * -(-shape[1] // size)


def _check_codebook(width: int, size: int, shape: Shape) -> None:
    if 1 << width > _blocks(size, shape):
        raise RecipeError(_too_large(1 << width, size, shape))


def _too_large(codewords: int, size: int, shape: Shape) -> str:
    return (
        f"a codebook of {codewords} entries is larger than the {_blocks(size, shape)} blocks of "
        f"{size} in a matrix {shape}; choose fewer --code-bits or a smaller --block-size"
    )
