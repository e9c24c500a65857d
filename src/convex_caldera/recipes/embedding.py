"""Recipes of embeddings: every row is a token, and tokens are as unlike as they are frequent.

A rotation of the rows would spread the noise of a matrix evenly over all tokens, small rows and
frequent ones included; kept apart, with a scale for each, rows have noise in proportion to
themselves. On the bundled model at 3 bits that is a sixth of the KL (docs/embeddings.md). It takes
a quantizer with scales of rows: others keep their rotation.
"""

from __future__ import annotations

from convex_caldera.core.recipe import Quantize, Recipe
from convex_caldera.quantizers.trellis import Trellis
from convex_caldera.recipes.guided import keep_rows_apart


def embedding_recipe(recipe: Recipe) -> Recipe:
    """The recipe for an embedding in place of a linear layer."""
    quantizers = [step.quantizer for step in recipe.steps if isinstance(step, Quantize)]
    by_rows = all(isinstance(quantizer, Trellis) for quantizer in quantizers)
    return keep_rows_apart(recipe) if by_rows else recipe
