"""The objective, written once: minimise tr(O (W - W^) H (W - W^)^T).

H weighs inputs; O weighs outputs and is the identity unless a Kronecker curvature of the model's
own loss was measured, in which case the objective is the predicted KL per token in nats.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from convex_caldera.core.hessian import Hessian
from convex_caldera.errors import NumericalError, ShapeError


@dataclass(frozen=True, eq=False)
class Problem:
    """Approximate W (out_features m, in_features n) under H (n, n) and, if given, O (m, m).

    Raises:
        ShapeError: W is not a matrix or H or O does not match its sides.
        NumericalError: W has NaN or infinite entries; the message names the first.
    """

    W: Tensor
    hessian: Hessian
    name: str = "W"
    output: Hessian | None = None
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
        bad = ~torch.isfinite(self.W)
        if bad.any():
            row, column = (int(i) for i in bad.nonzero()[0])
            raise NumericalError(
                f"{self.name}: weight is {self.W[row, column].item()} at [{row}, {column}] "
                f"({int(bad.sum())} such entries); repair the checkpoint"
            )

    def loss(self, W_hat: Tensor, dtype: torch.dtype = torch.float64) -> float:
        """tr(O (W - W_hat) H (W - W_hat)^T) under the undamped H and O.

        float64 is the reported precision; float32 halves the cost where losses are compared.
        """
        E = self.W.to(dtype) - W_hat.to(dtype)
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
        loss = self.loss(W_hat, dtype)
        return loss / self.energy if self.energy > 0 else float(loss > 0)
