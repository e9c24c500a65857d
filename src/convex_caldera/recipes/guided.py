"""Recipes under a metric that differs between groups of output channels.

A rotation of the outputs would mix channels whose metrics differ, so only inputs are rotated;
rows then keep their own magnitudes, and a trellis gets a scale for each of them.
"""

from __future__ import annotations

import dataclasses

from convex_caldera.core.protocols import Quantizer, Transform
from convex_caldera.core.recipe import Quantize, Recipe, Step
from convex_caldera.errors import RecipeError
from convex_caldera.quantizers.trellis import Trellis
from convex_caldera.transforms.hadamard import RandomizedHadamard


def keep_rows_apart(recipe: Recipe) -> Recipe:
    """The same recipe without a rotation of the outputs.

    Raises:
        RecipeError: the recipe rotates nothing but outputs.
    """
    return dataclasses.replace(
        recipe,
        transforms=tuple(_inputs_only(transform) for transform in recipe.transforms),
        steps=tuple(_scaled_rows(step) for step in recipe.steps),
    )


def _inputs_only(transform: Transform) -> Transform:
    if not isinstance(transform, RandomizedHadamard):
        return transform
    if not transform.inputs:
        raise RecipeError("guided curvature needs rows kept apart; rotate the inputs instead")
    return dataclasses.replace(transform, outputs=False)


def _scaled_rows(step: Step) -> Step:
    if not isinstance(step, Quantize) or not isinstance(step.quantizer, Trellis):
        return step
    quantizer: Quantizer = dataclasses.replace(step.quantizer, row_scales=True)
    return dataclasses.replace(step, quantizer=quantizer)
