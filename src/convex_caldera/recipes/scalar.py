"""Round to nearest, GPTQ and NormalFloat: one scalar quantizer under two metrics.

rtn     Quantize(Uniform, identity)
gptq    Quantize(Uniform, full)          LDLQ with column blocks of one is GPTQ
nf4     Quantize(NormalFloat, identity)
"""

from __future__ import annotations

from convex_caldera.core.recipe import Metric, Quantize, Recipe
from convex_caldera.quantizers.normal_float import NormalFloat
from convex_caldera.quantizers.uniform import Uniform
from convex_caldera.recipes.ladder import Shape, Wishes

# Coarse to fine; at 2 bits smaller groups still pay, above it the next bit is the better buy.
GROUP_SIZES = {2: (0, 256, 128, 96, 64, 48, 32)}
COMMON_GROUP_SIZES = (0, 256, 128, 64)
SCALAR_BITS = tuple(range(2, 9))
NORMAL_FLOAT_BITS = (2, 3, 4)


def uniform_recipe(bits: int, group_size: int = 128, metric: Metric = "full") -> Recipe:
    """Affine integer grid per group of input columns; "full" feeds errors back (GPTQ)."""
    return Recipe((Quantize(Uniform(bits, group_size=group_size), metric),))


def normal_float_recipe(bits: int = 4, group_size: int = 64) -> Recipe:
    """Quantiles of a normal distribution under a block's absolute maximum (QLoRA)."""
    return Recipe((Quantize(NormalFloat(bits, group_size=group_size), "identity"),))


def rtn_ladder(shape: Shape, wishes: Wishes) -> tuple[Recipe, ...]:
    return _uniform_ladder(shape, wishes, "identity")


def gptq_ladder(shape: Shape, wishes: Wishes) -> tuple[Recipe, ...]:
    return _uniform_ladder(shape, wishes, "full")


def normal_float_ladder(shape: Shape, wishes: Wishes) -> tuple[Recipe, ...]:
    return tuple(
        normal_float_recipe(bits, group)
        for bits in _bits(wishes, NORMAL_FLOAT_BITS)
        for group in _groups(shape, wishes, (256, 128, 64))
    )


def _uniform_ladder(shape: Shape, wishes: Wishes, metric: Metric) -> tuple[Recipe, ...]:
    return tuple(
        uniform_recipe(bits, group, metric)
        for bits in _bits(wishes, SCALAR_BITS)
        for group in _groups(shape, wishes, GROUP_SIZES.get(bits, COMMON_GROUP_SIZES))
    )


def _bits(wishes: Wishes, offered: tuple[int, ...]) -> tuple[int, ...]:
    return offered if wishes.bits is None else (int(wishes.bits),)


def _groups(shape: Shape, wishes: Wishes, offered: tuple[int, ...]) -> tuple[int, ...]:
    """Group sizes below the row length; the whole row (0) always is one."""
    if wishes.group_size is not None:
        return (wishes.group_size,)
    return tuple(g for g in offered if g < shape[1]) or (0,)
