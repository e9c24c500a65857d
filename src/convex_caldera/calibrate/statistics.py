"""Second moments of one layer input, summed as batches stream by.

    H = (1 / N) sum_t x_t x_t^T,      mean_abs_j = (1 / N) sum_t |x_tj|

Products in float32, sums in float64. A finished statistic is rounded to float32, as it is
stored, so that a run from saved statistics gives the same bytes as the run that made them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from convex_caldera.core.hessian import Hessian
from convex_caldera.errors import DataError, FormatError, NumericalError, ShapeError
from convex_caldera.linalg.finite import all_finite

# Rows per float32 product: short enough that its rounding stays far below the damping.
_CHUNK_ROWS = 4096
# Rows per float32 sum of |x|.
_ABSOLUTE_ROWS = 256


@dataclass(frozen=True, eq=False)
class InputStatistics:
    """What calibration knows of one input of n channels.

    Attributes:
        name: of the input site.
        packed: (n (n + 1) / 2,) float32, lower triangle of H row by row.
        mean_abs: (n,) float32, E|x|.
        num_tokens: how many x were seen.
    """

    name: str
    packed: Tensor
    mean_abs: Tensor
    num_tokens: int

    def second_moment(self) -> Tensor:
        """H (n, n), float64, symmetric."""
        return unpack_symmetric(self.packed, len(self.mean_abs)).double()

    def hessian(self, damping: float = 0.01) -> Hessian:
        """H with its damping, and mean_abs as a further statistic."""
        statistics = {"mean_abs": self.mean_abs.double()}
        return Hessian(self.second_moment(), damping, self.name, statistics)

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by field name."""
        return {"packed": self.packed, "mean_abs": self.mean_abs}

    @classmethod
    def restore(cls, name: str, tensors: Mapping[str, Tensor], num_tokens: int) -> InputStatistics:
        """Inverse of `tensors`; raises FormatError if they do not fit."""
        try:
            packed, mean_abs = tensors["packed"], tensors["mean_abs"]
        except KeyError as error:
            raise FormatError(f"statistics of {name} lack the field {error}") from error
        n = len(mean_abs) if mean_abs.dim() == 1 else -1
        if packed.shape != (n * (n + 1) // 2,) or num_tokens < 1:
            raise FormatError(
                f"statistics of {name} do not fit: packed {tuple(packed.shape)}, mean_abs "
                f"{tuple(mean_abs.shape)}, {num_tokens} tokens"
            )
        if packed.dtype != torch.float32 or mean_abs.dtype != torch.float32:
            raise FormatError(f"statistics of {name} must be float32, got {packed.dtype}")
        return cls(name, packed, mean_abs, num_tokens)


class InputAccumulator:
    """Sums over batches of the input of width n; `finish` gives the means.

    Memory: n^2 float64. Cost: 2 n^2 flop per token.
    """

    def __init__(self, name: str, width: int, device: torch.device | str = "cpu"):
        self.name = name
        self.width = width
        self.num_tokens = 0
        self._second = torch.zeros(width, width, dtype=torch.float64, device=device)
        self._absolute = torch.zeros(width, dtype=torch.float64, device=device)

    def add(self, x: Tensor, samples: range) -> None:
        """Add activations (..., n) that belong to `samples`, in order and in equal shares.

        Raises:
            ShapeError: x has another width.
            NumericalError: NaN or infinite values, or squares beyond float32; names the first
                bad sample.
        """
        if x.shape[-1] != self.width:
            raise ShapeError(f"{self.name}: expected width {self.width}, got {tuple(x.shape)}")
        rows = x.detach().reshape(-1, self.width).float()
        if not all_finite(rows):
            raise NumericalError(self._blame(rows, samples))
        for chunk in rows.split(_ABSOLUTE_ROWS):
            self._absolute += chunk.abs().sum(0)
        for chunk in rows.split(_CHUNK_ROWS):
            self._second += chunk.T @ chunk
        self.num_tokens += len(rows)
        if not all_finite(self._second.diagonal()):
            raise NumericalError(
                f"{self.name}: squares of activations exceed float32 in samples "
                f"{samples.start} to {samples.stop - 1} (greatest |x| {rows.abs().max():.3e})"
            )

    def finish(self) -> InputStatistics:
        """The means over all tokens, in stored precision.

        Raises:
            DataError: no token was seen.
        """
        if not self.num_tokens:
            raise DataError(
                f"{self.name}: no token of the calibration text reached this layer; give more "
                "text or leave the layer out"
            )
        second = (self._second / self.num_tokens).float().cpu()
        mean_abs = (self._absolute / self.num_tokens).float().cpu()
        return InputStatistics(self.name, pack_symmetric(second), mean_abs, self.num_tokens)

    def _blame(self, rows: Tensor, samples: range) -> str:
        bad = ~torch.isfinite(rows)
        row, channel = (int(i) for i in bad.nonzero()[0])
        per_sample, uneven = divmod(len(rows), len(samples))
        # Layers that see a selection of the tokens (experts) only tell the batch.
        where = (
            f"one of samples {samples.start} to {samples.stop - 1}"
            if uneven
            else f"sample {samples[row // per_sample]}"
        )
        return (
            f"{self.name}: activation is {rows[row, channel].item()} in {where}, channel "
            f"{channel} ({int(bad.sum())} such values in this batch); check the model in this "
            "dtype and the calibration text"
        )


def pack_symmetric(matrix: Tensor) -> Tensor:
    """Lower triangle of (n, n), row by row, as (n (n + 1) / 2,)."""
    return torch.cat([matrix[row, : row + 1] for row in range(len(matrix))])


def unpack_symmetric(packed: Tensor, n: int) -> Tensor:
    """Inverse of `pack_symmetric`, both triangles filled."""
    matrix = packed.new_zeros(n, n)
    for row, values in enumerate(packed.split(list(range(1, n + 1)))):
        matrix[row, : row + 1] = values
    return matrix + matrix.tril(-1).T
