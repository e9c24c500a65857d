"""The objective, written once: minimise tr((W - W^) H (W - W^)^T)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from convex_caldera.core.hessian import Hessian
from convex_caldera.errors import NumericalError, ShapeError


@dataclass(frozen=True, eq=False)
class Problem:
    """Approximate W (out_features, in_features) under H (in_features, in_features).

    Raises:
        ShapeError: W is not a matrix or H does not match its columns.
        NumericalError: W has NaN or infinite entries; the message names the first.
    """

    W: Tensor
    hessian: Hessian
    name: str = "W"
    _energy: list[float] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        if self.W.dim() != 2:
            raise ShapeError(f"{self.name}: a weight must be a matrix, got {tuple(self.W.shape)}")
        if len(self.hessian) != self.W.shape[1]:
            raise ShapeError(
                f"{self.name}: W is {tuple(self.W.shape)} but H has {len(self.hessian)} rows"
            )
        bad = ~torch.isfinite(self.W)
        if bad.any():
            row, column = (int(i) for i in bad.nonzero()[0])
            raise NumericalError(
                f"{self.name}: weight is {self.W[row, column].item()} at [{row}, {column}] "
                f"({int(bad.sum())} such entries); repair the checkpoint"
            )

    def loss(self, W_hat: Tensor, dtype: torch.dtype = torch.float64) -> float:
        """tr((W - W_hat) H (W - W_hat)^T) under the undamped H.

        float64 is the reported precision; float32 halves the cost where losses are compared.
        """
        E = self.W.to(dtype) - W_hat.to(dtype)
        H = self.hessian.matrix_as(dtype)
        return float(((E @ H) * E).sum(dtype=torch.float64))

    @property
    def energy(self) -> float:
        """tr(W H W^T), float64."""
        if not self._energy:
            self._energy.append(self.loss(torch.zeros_like(self.W)))
        return self._energy[0]

    def relative_loss(self, W_hat: Tensor, dtype: torch.dtype = torch.float64) -> float:
        """loss / tr(W H W^T); 0 / 0 counts as 0. Not square-rooted."""
        loss = self.loss(W_hat, dtype)
        return loss / self.energy if self.energy > 0 else float(loss > 0)
