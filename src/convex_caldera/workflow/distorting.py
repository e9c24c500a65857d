"""A quantizer against the Shannon limit of the Gaussian source."""

from __future__ import annotations

import difflib
import inspect
import json
from dataclasses import asdict, dataclass
from typing import Any

from convex_caldera.errors import RecipeError
from convex_caldera.quantizers import TABLE
from convex_caldera.quantizers.distortion import gaussian_distortion


@dataclass(frozen=True)
class Distortion:
    """Mean squared error on N(0, 1), stored bits per weight, and mse / 2^(-2 bits)."""

    quantizer: str
    mse: float
    stored_bits: float
    ratio: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        return (
            f"{self.quantizer}: mean squared error {self.mse:.6f} at {self.stored_bits:.4f} stored "
            f"bits, {self.ratio:.4f} times the Shannon limit"
        )


def measure_distortion(
    kind: str, bits: float, size: int, seed: int, options: tuple[str, ...] = ()
) -> Distortion:
    """Quantize `size` Gaussian weights, in rows of 1024, without feedback.

    Raises:
        RecipeError: unknown quantizer or option, or bits that it does not offer.
    """
    if kind not in TABLE:
        near = ", ".join(difflib.get_close_matches(kind, TABLE, n=3, cutoff=0.3) or sorted(TABLE))
        raise RecipeError(f"unknown quantizer {kind!r}; did you mean {near}?")
    fields = inspect.signature(TABLE[kind]).parameters
    whole = bits == int(bits) and fields["bits"].annotation not in ("float", float)
    values: dict[str, Any] = {"bits": int(bits) if whole else bits}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals or key not in fields:
            raise RecipeError(f"option {option!r} must read name=value with one of {list(fields)}")
        values[key] = _value(value)
    width = min(1024, size)
    shape = (max(size // width, 1), width)
    mse, stored = gaussian_distortion(TABLE[kind](**values), shape, seed)
    return Distortion(kind, mse, stored, mse * 4.0**stored)


def _value(text: str) -> Any:
    """A JSON number or boolean, else the text itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
