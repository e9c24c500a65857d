"""The short name of what a model computes with: "W4A8" is 4-bit codes and 8-bit activations.

The name says code bits alone. What is stored, scales and low-rank factors included, is the
bits column; both are printed side by side.
"""

from __future__ import annotations

from collections.abc import Iterable

from convex_caldera.core.recipe import Quantize, Recipe
from convex_caldera.recipes.activations import parse_activations

KEPT_BITS = 16


def precision_label(code_bits: Iterable[float], activations: str | None) -> str:
    """ "W4A8", or "W2-4A8" where layers differ; A16 where activations are kept.

    Args:
        code_bits: of every layer's coded term.
        activations: canonical text (`recipes.activations`), or None.
    """
    widths = sorted(set(code_bits))
    weights = f"{widths[0]:g}" + (f"-{widths[-1]:g}" if len(widths) > 1 else "")
    return f"W{weights}A{activation_bits(activations)}"


def activation_bits(activations: str | None) -> int:
    """Bits of a linear input; 16 stands for the working precision."""
    return KEPT_BITS if activations is None else parse_activations(activations).bits


def code_bits(recipe: Recipe) -> float:
    """Bits of the codes of a recipe's last quantizer; 16 if it has none."""
    widths = [
        getattr(s.quantizer, "bits", KEPT_BITS) for s in recipe.steps if isinstance(s, Quantize)
    ]
    return float(widths[-1]) if widths else float(KEPT_BITS)
