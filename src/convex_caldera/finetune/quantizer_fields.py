"""The continuous tensors of a fitted quantizer, nested ones included, and the same with others.

A quantizer decodes codes by tensors that it stores (scales, levels, codebooks) in plain torch, so
decoding is differentiable in them. One that wraps another (`inner`) has its tensors under a
prefix, as in the files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from convex_caldera.core.protocols import FittedQuantizer
from convex_caldera.finetune.parts import CODEBOOK_FIELDS, SCALE_FIELDS, Wish
from convex_caldera.quantizers.nested import INNER


def trainable_fields(fitted: FittedQuantizer, wish: Wish) -> dict[str, Tensor]:
    """Stored name -> value of every scale and codebook that the wish asks for."""
    wanted: set[str] = set()
    if "scales" in wish:
        # the grid of a range has a step beside its lower end
        wanted |= SCALE_FIELDS | ({"steps"} if hasattr(fitted, "lows") else set())
    if "codebooks" in wish:
        wanted |= CODEBOOK_FIELDS
    found = {
        name: tensor
        for name, tensor in sorted(fitted.tensors().items())
        if name in wanted and hasattr(fitted, name) and tensor.is_floating_point()
    }
    inner = getattr(fitted, "inner", None)
    if inner is not None:
        found |= {INNER + name: t for name, t in trainable_fields(inner, wish).items()}
    return found


def with_fields(fitted: Any, values: Mapping[str, Tensor]) -> Any:
    """The quantizer with some of its tensors replaced; nothing is rounded here."""
    own = {name: value for name, value in values.items() if not name.startswith(INNER)}
    inner = {n.removeprefix(INNER): v for n, v in values.items() if n.startswith(INNER)}
    if inner:
        own["inner"] = with_fields(fitted.inner, inner)
    return replace(fitted, **own)
