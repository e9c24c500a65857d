"""Reading the convex program's data: shapes, ranges, and one eigendecomposition per input."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convex_caldera.core.hessian import Hessian
from convex_caldera.errors import DataError, NumericalError, RecipeError, ShapeError
from convex_caldera.linalg.finite import all_finite

Numbers = float | Sequence[float]

POSITIVE = ("kappa", "k")  # the other constants may be zero
NEGATIVE_SHARE = 1e-10  # of the largest eigenvalue, below which a negative one is rounding


@dataclass(frozen=True, eq=False)
class Basis:
    """W Q (m, n), eigenvalues h (n,) >= 0 and eigenvectors Q (n, n); Q is None where H = I."""

    W: Tensor
    h: Tensor
    Q: Tensor | None


def eigenbases(W: Sequence[Tensor], H: Sequence[Tensor | Hessian | None]) -> list[Basis]:
    """Every group in the eigenbasis of its H, float64; the same H object is factored once.

    Raises:
        ShapeError: counts or shapes differ.
        NumericalError: NaN or infinite entries, or an H with a negative eigenvalue.
    """
    if len(W) != len(H):
        raise ShapeError(f"{len(W)} weights but {len(H)} Hessians; give one (or None) per weight")
    known: dict[int, tuple[Tensor, Tensor | None]] = {}
    bases = []
    for g, (weight, hessian) in enumerate(zip(W, H, strict=True)):
        if weight.dim() != 2 or 0 in weight.shape:
            raise ShapeError(f"W[{g}] must be a non-empty matrix, got {tuple(weight.shape)}")
        if not all_finite(weight):
            raise NumericalError(f"W[{g}] has NaN or infinite entries; repair the checkpoint")
        values = weight.double()
        if hessian is None:
            bases.append(Basis(values, values.new_ones(values.shape[1]), None))
            continue
        if id(hessian) not in known:
            known[id(hessian)] = _eigen(hessian, f"H[{g}]")
        h, Q = known[id(hessian)]
        if len(h) != values.shape[1]:
            raise ShapeError(f"W[{g}] is {tuple(values.shape)} but H[{g}] has {len(h)} rows")
        bases.append(Basis(values if Q is None else values @ Q, h, Q))
    return bases


def _eigen(hessian: Tensor | Hessian, name: str) -> tuple[Tensor, Tensor | None]:
    if isinstance(hessian, Hessian):
        return hessian.memo("eigen", lambda: _eigen(hessian.damped, hessian.name))
    if hessian.dim() != 2 or hessian.shape[0] != hessian.shape[1]:
        raise ShapeError(f"{name} must be square, got {tuple(hessian.shape)}")
    if not all_finite(hessian):
        raise NumericalError(f"{name} has NaN or infinite entries; check the activations")
    matrix = 0.5 * (hessian + hessian.T).double()
    if torch.equal(matrix, torch.diag(matrix.diagonal())):
        h, Q = matrix.diagonal().clone(), None
    else:
        h, Q = torch.linalg.eigh(matrix)
    if float(h.min()) < -NEGATIVE_SHARE * max(float(h.max()), 0.0):
        raise NumericalError(
            f"{name} has the eigenvalue {float(h.min()):.3e} below zero; add damping of at least "
            "that size"
        )
    # Eigenvalues that are zero but for rounding: R in their directions is free, or forbidden.
    noise = len(h) * torch.finfo(h.dtype).eps * float(h.max())
    return torch.where(h > noise, h, 0.0), Q


def read_numbers(
    groups: int, constants: Mapping[str, Numbers | None], budget: float
) -> dict[str, Any]:
    """The constants as float64 arrays (groups,), checked; mu or tau is None, budget a float."""
    if groups == 0:
        raise DataError("the program has no groups; there is nothing to solve")
    if (constants["mu"] is None) == (constants["tau"] is None):
        raise RecipeError("give exactly one of mu (penalty form) and tau (constrained form)")
    numbers: dict[str, Any] = {
        name: None if value is None else _spread(value, name, groups, positive=name in POSITIVE)
        for name, value in constants.items()
    }
    numbers["budget"] = float(budget)
    if not math.isfinite(numbers["budget"]):
        raise RecipeError(f"the budget must be a finite number of bits, got {budget}")
    wrong = np.flatnonzero(numbers["b_min"] > numbers["b_max"])
    if len(wrong):
        g = int(wrong[0])
        raise RecipeError(
            f"group {g}: b_min = {numbers['b_min'][g]} exceeds b_max = {numbers['b_max'][g]}"
        )
    return numbers


def _spread(value: Numbers, name: str, groups: int, *, positive: bool) -> Any:
    array = np.asarray(value, dtype=np.float64)
    if array.ndim > 1 or array.size not in (1, groups):
        raise ShapeError(f"{name} must be one number or {groups} of them, got shape {array.shape}")
    spread = np.broadcast_to(array.reshape(-1), (groups,)).copy()
    wrong = ~np.isfinite(spread) | ((spread <= 0) if positive else (spread < 0))
    if wrong.any():
        g = int(np.flatnonzero(wrong)[0])
        least = "> 0" if positive else ">= 0"
        raise RecipeError(f"{name} of group {g} is {spread[g]}; it must be finite and {least}")
    return spread
