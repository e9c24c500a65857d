"""How the forward pass rounds activations: a format for linear inputs, one for attention.

    mxint8/16                                both, blocks of 16 along the contraction axis
    mxint8/16,attention:none                 inputs of compressed layers only
    mxint8/16,attention:mxint6/16            another format for both attention products
    mxint8/16,layout:legacy                  attention blocks as in the code of LQER

This text is what config.json and recipes store. Scales are found anew in every forward pass, one
per block; none is shared between tokens of a linear input, so a result never depends on its
neighbours in a batch. Weights, biases, sums and what else is computed stay as they are.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, get_args

from convex_caldera.core.protocols import Quantizer
from convex_caldera.errors import RecipeError
from convex_caldera.quantizers.groups import PER_TENSOR
from convex_caldera.quantizers.mxint import EXPONENT_BITS, MXInt
from convex_caldera.recipes.formats import format_name, parse_format

Layout = Literal["contraction", "legacy"]
NONE = "none"


@dataclass(frozen=True)
class Activations:
    """Formats of activations, None where they are kept.

    Args:
        linear: of the inputs of compressed layers, and of R x before L reads it.
        attention: of queries, keys, probabilities and values.
        layout: "contraction" lays the blocks of both attention products along the axis that is
            summed over: keys along the head, values along tokens. "legacy" lays keys along
            tokens and values along the head, as the code of LQER does.

    Raises:
        RecipeError: nothing is rounded, or a format that cannot be found anew for every token.
    """

    linear: Quantizer | None
    attention: Quantizer | None = None
    layout: Layout = "contraction"

    def __post_init__(self) -> None:
        if self.linear is None and self.attention is None:
            raise RecipeError("activations round nothing; leave the option out")
        if self.layout not in get_args(Layout):
            raise RecipeError(f"layout is one of {', '.join(get_args(Layout))}, got {self.layout}")
        for quantizer in (self.linear, self.attention):
            if quantizer is not None:
                _check(quantizer)

    @property
    def name(self) -> str:
        """The text that `parse_activations` reads as this."""
        parts = [_name(self.linear)]
        if self.attention != self.linear:
            parts.append(f"attention:{_name(self.attention)}")
        if self.layout != "contraction":
            parts.append(f"layout:{self.layout}")
        return ",".join(parts)

    @property
    def bits(self) -> int:
        """Of a linear input, or of an attention operand if inputs are kept: the 8 of "W4A8"."""
        return int(getattr(self.linear or self.attention, "bits", 16))


def parse_activations(text: str) -> Activations:
    """Activations from their text.

    Raises:
        RecipeError: unknown format or key, or a key given twice.
    """
    first, *rest = text.split(",")
    pairs = [part.partition(":") for part in rest]
    options = {key: value for key, _, value in pairs}
    if len(options) < len(pairs) or set(options) - {"attention", "layout"}:
        raise RecipeError(
            f"activations {text!r} must read FORMAT[,attention:FORMAT|none]"
            "[,layout:contraction|legacy], such as mxint8/16"
        )
    layout = options.get("layout", "contraction")
    return Activations(
        _quantizer(first),
        _quantizer(options.get("attention", first)),
        layout,  # type: ignore[arg-type]
    )


def _quantizer(text: str) -> Quantizer | None:
    """Without a search and with float32 scales: activations are rounded on the way."""
    if text == NONE:
        return None
    quantizer = parse_format(text).quantizer(search=False)
    if any(field.name == "scale_dtype" for field in dataclasses.fields(quantizer)):  # type: ignore[arg-type]
        quantizer = dataclasses.replace(quantizer, scale_dtype="float32")  # type: ignore[type-var]
    return quantizer


def _name(quantizer: Quantizer | None) -> str:
    return NONE if quantizer is None else format_name(quantizer)


def _check(quantizer: Quantizer) -> None:
    if getattr(quantizer, "group_size", PER_TENSOR) == PER_TENSOR:
        raise RecipeError("one scale for all activations would tie tokens together; give a block")
    if isinstance(quantizer, MXInt) and quantizer.exponent_bits != EXPONENT_BITS:
        raise RecipeError(
            f"activations have no common exponent base; {quantizer.exponent_bits}-bit exponents "
            "are for weights"
        )
