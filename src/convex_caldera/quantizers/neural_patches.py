"""Square patches of a matrix, each with the weights of its columns and rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

STEPS_AN_EPOCH = 8  # at least, where there are so many patches
BATCH_VALUES = 1 << 18  # at most, but one patch


@dataclass(frozen=True, eq=False)
class Patches:
    """Values (N, 1, p, p), and the weight of each of their columns (N, 1, 1, p) and rows.

    What lies outside of the matrix has weight 0.
    """

    values: Tensor
    columns: Tensor
    rows: Tensor

    def __len__(self) -> int:
        return self.values.shape[0]

    def take(self, index: Tensor) -> Patches:
        return Patches(self.values[index], self.columns[index], self.rows[index])

    def batch_size(self) -> int:
        """Patches that are looked at together: bounded, and several batches where there can be."""
        most = max(BATCH_VALUES // self.values.shape[-1] ** 2, 1)
        return max(min(-(-len(self) // STEPS_AN_EPOCH), most), 1)

    def batches(self) -> Iterator[Patches]:
        """All patches in their order."""
        return (self.take(i) for i in torch.arange(len(self)).split(self.batch_size()))

    @property
    def energy(self) -> Tensor:
        """(N,) weighted squares of each patch."""
        return self.errors(torch.zeros_like(self.values))

    def errors(self, values: Tensor) -> Tensor:
        """(N,) weighted squared distance of each patch."""
        gaps = (values - self.values).square() * self.columns * self.rows
        return gaps.sum((1, 2, 3))


def patches_of(V: Tensor, patch: int, importance: Tensor | None = None) -> Patches:
    """A matrix (m, n) cut into patches, row by row of patches, zeros at the lower and right rim."""
    m, n = V.shape
    down, across = -(-m // patch), -(-n // patch)
    padded = F.pad(V.float(), (0, across * patch - n, 0, down * patch - m))
    values = padded.view(down, patch, across, patch).transpose(1, 2).reshape(-1, 1, patch, patch)
    weights = torch.ones(n, device=V.device) if importance is None else importance.float()
    columns = F.pad(weights, (0, across * patch - n)).view(1, across, 1, 1, patch)
    rows = F.pad(torch.ones(m, device=V.device), (0, down * patch - m)).view(down, 1, 1, patch, 1)
    return Patches(
        values,
        columns.expand(down, -1, -1, -1, -1).reshape(-1, 1, 1, patch),
        rows.expand(-1, across, -1, -1, -1).reshape(-1, 1, patch, 1),
    )


def joined(patches: list[Patches]) -> Patches:
    """The patches of several matrices, each weighted so that all have one energy."""
    scaled = []
    for part in patches:
        energy = float(part.energy.sum())
        factor = part.rows.sum() * part.values.shape[-1] / energy if energy > 0 else 1.0
        scaled.append(Patches(part.values, part.columns * factor, part.rows))
    return Patches(
        torch.cat([part.values for part in scaled]),
        torch.cat([part.columns for part in scaled]),
        torch.cat([part.rows for part in scaled]),
    )


def unpatched(values: Tensor, shape: tuple[int, int]) -> Tensor:
    """Inverse of `patches_of`: (N, p, p) -> (m, n)."""
    (m, n), patch = shape, values.shape[-1]
    down, across = -(-m // patch), -(-n // patch)
    grid = values.view(down, across, patch, patch).transpose(1, 2)
    return grid.reshape(down * patch, across * patch)[:m, :n]
