"""Recipes under a metric that differs between groups of output channels.

A rotation of the outputs would mix channels whose metrics differ, so only inputs are rotated;
rows then keep their own magnitudes, and a trellis gets a scale for each of them. Those scales
cost 16 / n bits a weight: narrow layers have one group, and their recipes stay as they are.
"""

from __future__ import annotations

import dataclasses

from convex_caldera.core.protocols import Quantizer, Transform
from convex_caldera.core.recipe import Quantize, Recipe, Step
from convex_caldera.errors import RecipeError
from convex_caldera.quantizers.trellis import Trellis
from convex_caldera.transforms.hadamard import RandomizedHadamard

GROUPS = 4
# Below so many columns scales of rows cost more than metrics of their own gain.
LEAST_COLUMNS = 1024


def group_count(shape: tuple[int, int]) -> int:
    """Row groups of a layer (m, n) under guided curvature."""
    return GROUPS if shape[1] >= LEAST_COLUMNS else 1


def guided_recipe(recipe: Recipe, shape: tuple[int, int]) -> Recipe:
    """The recipe for a layer (m, n) under guided curvature."""
    return keep_rows_apart(recipe) if group_count(shape) > 1 else recipe


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
