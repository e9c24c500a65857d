"""Second moments of a layer's input, damped explicitly, with factorizations shared.

H = E[x x^T], a mean over tokens without the factor 2, float64. Fits see the damped matrix
H + damping * mean(diag H) * I; losses are always reported under the undamped one. One object
serves all layers that read the same input, so that each factorization is made once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from convex_caldera.errors import NumericalError, ShapeError
from convex_caldera.linalg.factor import block_unit_upper, checked_cholesky
from convex_caldera.linalg.finite import all_finite


class Hessian:
    """H of one input site and what is derived from it.

    Args:
        matrix: (n, n) symmetric positive semidefinite, E[x x^T].
        damping: fraction of the mean diagonal added before any factorization.
        name: of the input site, for messages.
        statistics: further per-channel statistics of the same tokens by name, each (n,), such
            as "mean_abs" = E|x_j| (L2QER).

    Raises:
        ShapeError: the matrix is not square.
        NumericalError: it has NaN or infinite entries, or a negative diagonal.
    """

    def __init__(
        self,
        matrix: Tensor,
        damping: float = 0.01,
        name: str = "H",
        statistics: dict[str, Tensor] | None = None,
    ):
        if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ShapeError(f"{name}: H must be square, got {tuple(matrix.shape)}")
        if not all_finite(matrix):
            raise NumericalError(f"{name}: H has NaN or infinite entries; check the activations")
        if (matrix.diagonal() < 0).any():
            least = matrix.diagonal().min().item()
            raise NumericalError(f"{name}: H has a negative diagonal entry {least:.3e}")
        self.matrix = (0.5 * (matrix + matrix.T)).double()
        self.damping = damping
        self.name = name
        self.statistics = statistics or {}
        self._memo: dict[Any, Any] = {}

    def __len__(self) -> int:
        return self.matrix.shape[0]

    @classmethod
    def identity(cls, size: int, device: torch.device | str = "cpu") -> Hessian:
        """H = I without damping: the plain Frobenius metric."""
        return cls(torch.eye(size, dtype=torch.float64, device=device), 0.0, "identity")

    @property
    def ridge(self) -> float:
        """What is added to the diagonal: damping * mean(diag H), or damping if H is zero."""
        mean = self.matrix.diagonal().mean().item()
        return self.damping * (mean if mean > 0 else 1.0)

    @cached_property
    def dead(self) -> Tensor:
        """Boolean (n,): channels that were zero on every token; they are rounded plainly."""
        return self.matrix.diagonal() == 0

    @cached_property
    def damped(self) -> Tensor:
        """H + ridge I, float64."""
        return self.matrix + self.ridge * torch.eye(
            len(self), dtype=torch.float64, device=self.matrix.device
        )

    @cached_property
    def root(self) -> Tensor:
        """Lower triangular M with M M^T = damped H. Raises NumericalError if there is none."""
        return checked_cholesky(self.damped, self.name)

    def matrix_as(self, dtype: torch.dtype) -> Tensor:
        """The undamped matrix in another precision, converted once."""
        return self.memo(("matrix", dtype), lambda: self.matrix.to(dtype))

    def damped_as(self, dtype: torch.dtype) -> Tensor:
        """The damped matrix in another precision, converted once."""
        return self.memo(("damped", dtype), lambda: self.damped.to(dtype))

    def unit_upper(self, block: int) -> Tensor:
        """U with identity diagonal blocks, damped H = U D U^T: the feedback of LDLQ."""
        return self.memo(
            ("unit_upper", block), lambda: block_unit_upper(self.damped, block, self.name)
        )

    def memo(self, key: Any, make: Callable[[], Any]) -> Any:
        """`make()` once per key; transforms keep the rotated Hessian here."""
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]

    def to(self, device: torch.device | str) -> Hessian:
        """A copy on another device."""
        moved = {k: v.to(device) for k, v in self.statistics.items()}
        return Hessian(self.matrix.to(device), self.damping, self.name, moved)
