"""The objective, written once: minimise tr(O (W - W^) H (W - W^)^T).

H weighs inputs; O weighs outputs and is the identity unless a Kronecker curvature of the model's
own loss was measured, in which case the objective is the predicted KL per token in nats. Where
every group of rows has a metric H_k of its own it is sum_k tr((W - W^)_k H_k (W - W^)_k^T).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from convex_caldera.core.hessian import Hessian
from convex_caldera.errors import NumericalError, ShapeError
from convex_caldera.linalg.finite import all_finite

# Row groups begin at multiples of this, the height of a trellis tile.
ROW_UNIT = 16


def row_slices(rows: int, groups: int) -> tuple[slice, ...]:
    """At most `groups` runs of rows of equal height, a multiple of 16; the last may be shorter."""
    units = -(-rows // ROW_UNIT)
    height = ROW_UNIT * -(-units // max(groups, 1))
    return tuple(slice(start, min(start + height, rows)) for start in range(0, rows, height))


@dataclass(frozen=True, eq=False)
class Problem:
    """Approximate W (out_features m, in_features n) under H (n, n) and, if given, O (m, m).

    `groups` are the metrics H_k of the row groups `row_slices(m, len(groups))`. Then H and O,
    a diagonal one, are their nearest Kronecker product in trace, which is what steps that need
    a product see (the low-rank step); rounding and the loss go by the groups.

    Raises:
        ShapeError: W is not a matrix or H, O or a group's metric does not match its sides.
        NumericalError: W has NaN or infinite entries; the message names the first.
    """

    W: Tensor
    hessian: Hessian
    name: str = "W"
    output: Hessian | None = None
    groups: tuple[Hessian, ...] = ()
    _energy: list[float] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        if self.W.dim() != 2:
            raise ShapeError(f"{self.name}: a weight must be a matrix, got {tuple(self.W.shape)}")
        if len(self.hessian) != self.W.shape[1]:
            raise ShapeError(
                f"{self.name}: W is {tuple(self.W.shape)} but H has {len(self.hessian)} rows"
            )
        if self.output is not None and len(self.output) != self.W.shape[0]:
            raise ShapeError(
                f"{self.name}: W is {tuple(self.W.shape)} but O has {len(self.output)} rows"
            )
        if self.groups and len(self.row_groups) != len(self.groups):
            raise ShapeError(f"{self.name}: {self.W.shape[0]} rows, {len(self.groups)} row groups")
        if any(len(H) != self.W.shape[1] for H in self.groups):
            raise ShapeError(
                f"{self.name}: a row group's metric does not fit {tuple(self.W.shape)}"
            )
        if not all_finite(self.W):
            bad = ~torch.isfinite(self.W)
            row, column = (int(i) for i in bad.nonzero()[0])
            raise NumericalError(
                f"{self.name}: weight is {self.W[row, column].item()} at [{row}, {column}] "
                f"({int(bad.sum())} such entries); repair the checkpoint"
            )

    @classmethod
    def by_row_groups(cls, W: Tensor, groups: tuple[Hessian, ...], name: str = "W") -> Problem:
        """W under a metric of its own for every row group; one group is the plain problem."""
        if len(groups) == 1:
            return cls(W, groups[0], name)
        slices = row_slices(W.shape[0], len(groups))
        if len(slices) != len(groups):
            raise ShapeError(f"{name}: {W.shape[0]} rows, {len(groups)} row groups")
        heights = [rows.stop - rows.start for rows in slices]
        matrix = sum(h * H.matrix for h, H in zip(heights, groups, strict=True)) / W.shape[0]
        mean = Hessian(torch.as_tensor(matrix), groups[0].damping, f"{name} (mean of row groups)")
        trace = float(mean.matrix.diagonal().sum())
        shares = [float(H.matrix.diagonal().sum()) / trace if trace > 0 else 1.0 for H in groups]
        weights = torch.cat(
            [torch.full((h,), s, dtype=torch.float64) for h, s in zip(heights, shares, strict=True)]
        )
        output = Hessian(torch.diag(weights).to(W.device), 0.0, f"{name} (row group weights)")
        return cls(W, mean, name, output, groups)

    @property
    def row_groups(self) -> tuple[slice, ...]:
        """The rows of every group."""
        return row_slices(self.W.shape[0], len(self.groups)) if self.groups else ()

    def loss(self, W_hat: Tensor, dtype: torch.dtype = torch.float64) -> float:
        """tr(O (W - W_hat) H (W - W_hat)^T) under the undamped H and O, or by row groups.

        float64 is the reported precision; float32 halves the cost where losses are compared.
        """
        E = self.W.to(dtype) - W_hat.to(dtype)
        if self.groups:
            pairs = zip(self.row_groups, self.groups, strict=True)
            parts = (
                ((E[r] @ H.matrix_as(dtype)) * E[r]).sum(dtype=torch.float64) for r, H in pairs
            )
            return float(sum(parts))
        EH = E @ self.hessian.matrix_as(dtype)
        OE = E if self.output is None else self.output.matrix_as(dtype) @ E
        return float((EH * OE).sum(dtype=torch.float64))

    @property
    def energy(self) -> float:
        """tr(O W H W^T), float64."""
        if not self._energy:
            self._energy.append(self.loss(torch.zeros_like(self.W)))
        return self._energy[0]

    def relative_loss(self, W_hat: Tensor, dtype: torch.dtype = torch.float64) -> float:
        """loss / energy; 0 / 0 counts as 0. Not square-rooted."""
        return self.share(self.loss(W_hat, dtype))

    def share(self, loss: float) -> float:
        """A loss as a share of the energy; 0 / 0 counts as 0."""
        return loss / self.energy if self.energy > 0 else float(loss > 0)

    def moved(
        self, W: Tensor, hessian: Hessian, output: Hessian | None, groups: tuple[Hessian, ...]
    ) -> Problem:
        """This problem in other coordinates or under other damping, of the same energy.

        The energy is that of the first coordinates, whoever asks for it first: in others it has
        other rounding errors, and records would depend on what was fitted before.
        """
        return Problem(W, hessian, self.name, output, groups, [self.energy])
