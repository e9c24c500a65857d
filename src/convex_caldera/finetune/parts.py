"""What of a compressed model can be trained, and a tensor while it is being trained.

    lowrank     factors that are there, decoded and kept in 16 bits from then on
    lora        `rank` components: of the factors that are there, or new ones that start at zero
    dora        magnitudes of the rows of the weight (DoRA), starting where they are
    signs       the sign vectors of the Hadamard rotations as real numbers (RHT fine-tuning)
    scales      scales of the quantizers, in the precision in which they are stored
    codebooks   learned codebooks, likewise
    norms       weights of the normalization layers, in the original's precision

Codes never change. A tensor v is trained as v = unit * phi with a power of two `unit` near its
root mean square, so that one learning rate means the same relative step everywhere and rounding
v to its stored precision is exact in phi.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from convex_caldera.errors import RecipeError

PARTS = ("lowrank", "lora", "dora", "signs", "scales", "codebooks", "norms")
DEFAULT_RANK = 16
# Stored tensors of quantizers by what they are; any other is neither trained nor touched.
SCALE_FIELDS = frozenset({"scale", "scales", "row_scale", "lows"})
CODEBOOK_FIELDS = frozenset({"codebook", "levels"})


@dataclass(frozen=True)
class Wish:
    """Which parts to train, and `rank`, the components that `lora` trains in each layer.

    Raises:
        RecipeError: no part, an unknown one, `lowrank` and `lora` together, or rank < 1.
    """

    parts: tuple[str, ...]
    rank: int = DEFAULT_RANK

    def __post_init__(self) -> None:
        unknown = [part for part in self.parts if part not in PARTS]
        if not self.parts or unknown:
            got = f"unknown part {unknown[0]!r}" if unknown else "nothing to train"
            raise RecipeError(f"{got}; choose from {', '.join(PARTS)}")
        if "lowrank" in self.parts and "lora" in self.parts:
            raise RecipeError("lowrank trains all components and lora some; choose one of them")
        if self.rank < 1:
            raise RecipeError(f"the trainable rank must be at least 1, got {self.rank}")

    def __contains__(self, part: str) -> bool:
        return part in self.parts


@dataclass(frozen=True, eq=False)
class Tuned:
    """A tensor in training: phi, its unit, and the dtype in which it will be stored."""

    phi: nn.Parameter
    unit: float
    dtype: torch.dtype

    def value(self) -> Tensor:
        """unit * phi, differentiable."""
        return self.phi * self.unit

    @torch.no_grad()
    def stored(self) -> Tensor:
        """The value as it would be written now, on the CPU."""
        return (self.phi * self.unit).to(self.dtype).cpu()

    @torch.no_grad()
    def assign(self, value: Tensor) -> None:
        """Go on from this value."""
        self.phi.copy_(value.to(self.phi) / self.unit)


def tuned(start: Tensor, dtype: torch.dtype, unit: float | None = None) -> Tuned:
    """Begin training at `start`; the unit is its root mean square unless given."""
    size = float(start.double().square().mean().sqrt()) if unit is None else unit
    unit = 2.0 ** round(math.log2(size)) if size > 0 else 1.0
    return Tuned(nn.Parameter(start.detach().float() / unit), unit, dtype)


@contextmanager
def as_stored(tensors: Sequence[Tuned]) -> Iterator[None]:
    """Every tensor at the value that would be written now, given back at the end."""
    kept = [each.phi.detach().clone() for each in tensors]
    try:
        for each in tensors:
            each.assign(each.stored())
        yield
    finally:
        with torch.no_grad():
            for each, phi in zip(tensors, kept, strict=True):
                each.phi.copy_(phi)


def half_dtype(values: Tensor) -> torch.dtype:
    """float16, or bfloat16 for values that float16 cannot hold."""
    fits = float(values.abs().max()) < 0.5 * torch.finfo(torch.float16).max
    return torch.float16 if fits else torch.bfloat16
