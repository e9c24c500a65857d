"""A one-number-per-column quantizer with no cleverness, for laws about the algorithms."""

from dataclasses import dataclass
from typing import ClassVar

import torch


@dataclass(frozen=True)
class Grid:
    """Multiples of `step`, columns taken `block` at a time; float64-exact, never stored."""

    step: float = 0.5
    block: int = 1
    kind: ClassVar[str] = "toy-grid"

    def fit(self, W, *, importance=None, gain=1.0):
        return FittedGrid(self, tuple(W.shape), self.step * gain)


@dataclass(frozen=True)
class FittedGrid:
    quantizer: Grid
    shape: tuple
    step: float
    row_block: ClassVar[int] = 1
    position_free: ClassVar[bool] = True

    def encode(self, x, start=0):
        return torch.round(x / self.step).long()

    def decode(self, codes, start=0):
        return codes.double() * self.step

    def take_rows(self, rows):
        return self
