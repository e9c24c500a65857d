"""The convex program: low rank, residual energy and bits decided together, with a dual bound.

    minimise   sum_g  1/2 ||(W_g - Z_g - R_g) C_g||_F^2  +  mu_g ||Z_g||_*  +  lambda_g q_g
    subject to ||R_g||_F^2 <= kappa_g q_g ,   q_g >= c_g exp(-k_g b_g) ,
               b_min <= b_g <= b_max ,   sum_g p_g b_g <= B            (C_g C_g^T = H_g)

(penalty form), or with ||Z_g||_* <= tau_g in place of the nuclear-norm term (constrained form).

How it is solved. In the eigenbasis of H the nuclear norm is unchanged and H is diagonal. For
fixed Z everything else is scalar (price.py): R = (W - Z) H_s / (2 s), H_s = 2 s H (2 s I + H)^-1.
The minimum over R, q and b, as a function of Z alone, is an infimal convolution with
1/2 ||. C||^2; hence it is convex with curvature at most lambda_max(H), and its gradient is
-(W - Z) H_s at the settled s. One accelerated proximal descent (linalg/proximal.py) over all
groups at once therefore solves the whole program, price included: no nested loops.

What is proved. Any nu >= 0, 0 <= s_g <= lambda_g / kappa_g and matrices E_g bound the optimum:

    sum_g <Y_g, W_g> - 1/2 tr(E_g H_g E_g^T) - ||Y_g||_F^2 / (4 s_g)
        + min_b [(lambda_g - kappa_g s_g) c_g e^{-k_g b} + nu p_g b]  -  nu B ,   Y_g = E_g H_g,

provided ||Y_g||_2 <= mu_g (constrained: minus tau_g ||Y_g||_2 instead). V = E C gives the form of
the literature; with E no root of H is needed, neither here nor in a checker. We take
E_g = W_g - Z_g - R_g with the leading singular values of Y_g set to mu_g (linalg/dual_norm.py), a
correction of low rank from the left, so the certificate is the solution, nu, s and that. The
norm of Y_g is bounded from above by a Cholesky factorization, never by a power iteration alone.
A descent stopped early gives a feasible point and a valid bound that lie further apart.

Source: the program is that of the EE274 "Convex-CALDERA" report; corrected (the exponential
cone's order, kappa's meaning, a gap that is a gap), decomposed and certified here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convex_caldera.allocate.price import Rates, Settled, rate_value, saturation, settle
from convex_caldera.allocate.program_input import Numbers, eigenbases, read_numbers
from convex_caldera.core.hessian import Hessian
from convex_caldera.errors import InfeasibleBudgetError
from convex_caldera.linalg.dual_norm import (
    DualCorrection,
    equalize,
    spectral_norm_bound,
    spectral_norm_estimate,
)
from convex_caldera.linalg.proximal import Iterate, descend
from convex_caldera.linalg.thresholding import Factored, Thresholder

CHECK_EVERY = 4  # steps between dual bounds; one costs about as much as a step
MOST_STEPS = 2000
SUM_ROUNDING = 1e-14  # relative; within it sums of p b_min in different orders are one budget

Norm = Callable[[Tensor, Tensor | None], float]


@dataclass(frozen=True, eq=False)
class ProgramSolution:
    """A feasible point, a dual bound, and all that is needed to recompute both.

    Attributes, one entry per group where plural:
        primal: objective of this point. dual: lower bound of the optimum. dual <= primal.
        gap: (primal - dual) / |primal|.
        price: nu, the budget's multiplier, in objective per bit.
        bits: b_g. budget: B, in the units of sum p_g b_g.
        low_rank: (left (m, r), right (r, n)) with Z = left right, balanced, so that
            ||Z||_* = (||left||_F^2 + ||right||_F^2) / 2.
        residual: R_g (m, n).
        multipliers: s_g. duals: (scale_g, left (m, r), weights (r,)); the dual matrix is
            E_g = scale_g (E0 - left diag(weights) left^T E0), E0 = W_g - Z_g - R_g.
        constants: mu or tau (the other is None), lam, kappa, c, k, p, b_min and b_max of the
            program, float64 (groups,).
        status: "optimal" (gap <= tol) or "stopped" (ran out of steps; the gap says how far).
        steps: accelerated steps taken.
    """

    primal: float
    dual: float
    gap: float
    price: float
    bits: tuple[float, ...]
    budget: float
    low_rank: tuple[tuple[Tensor, Tensor], ...]
    residual: tuple[Tensor, ...]
    multipliers: tuple[float, ...]
    duals: tuple[DualCorrection, ...]
    constants: Mapping[str, Any]
    status: str
    steps: int

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(left.shape[1] for left, _ in self.low_rank)

    def dual_matrix(self, g: int, W: Tensor) -> Tensor:
        """E_g (m, n) of the bound above, for the same W_g that was solved."""
        left, right = self.low_rank[g]
        return self.duals[g].apply(W.double() - left @ right - self.residual[g])


def solve_program(
    W: Sequence[Tensor],
    H: Sequence[Tensor | Hessian | None],
    *,
    mu: Numbers | None = None,
    tau: Numbers | None = None,
    lam: Numbers,
    kappa: Numbers,
    c: Numbers,
    k: Numbers,
    p: Numbers,
    b_min: Numbers,
    b_max: Numbers,
    budget: float,
    tol: float = 1e-6,
    most_steps: int = MOST_STEPS,
) -> ProgramSolution:
    """Solve the program for groups W_g (m_g, n_g) under H_g (n_g, n_g) to relative gap `tol`.

    Args:
        W: one matrix per group.
        H: positive semidefinite, singular or zero allowed; a `Hessian` counts as its damped
            matrix, None as the identity. The same object in several places is factored once.
        mu, tau: exactly one of them: nuclear-norm penalty, or its bound. >= 0.
        lam, kappa, c, k, p, b_min, b_max: one number for all groups or one per group;
            lam, c, p >= 0, kappa, k > 0. kappa is the residual energy per unit of q at which
            the quantizer's distortion reaches c.
        budget: B in the units of sum p_g b_g.
        tol: relative gap at which to stop.
        most_steps: accelerated steps after which to stop anyway, with status "stopped".

    Raises:
        ShapeError, NumericalError: W or H do not fit together, or are not finite, or H has a
            negative eigenvalue.
        RecipeError: a constant is out of range, or not exactly one of mu and tau is given.
        InfeasibleBudgetError: the budget is below sum p b_min.

    Cost: one eigendecomposition per distinct H, then about twenty partial SVDs and three
    m x n x n products per group; seven m x n float64 arrays per group.
    """
    constants = {
        "mu": mu, "tau": tau, "lam": lam, "kappa": kappa, "c": c, "k": k, "p": p,
        "b_min": b_min, "b_max": b_max,
    }  # fmt: skip
    numbers = read_numbers(len(W), constants, budget)
    least = math.fsum(numbers["p"] * numbers["b_min"])
    if least * (1.0 - SUM_ROUNDING) > budget:
        raise InfeasibleBudgetError(
            f"the budget of {budget} bits is below sum p b_min = {least}; raise it or lower b_min",
            math.ceil(least),
        )
    numbers["budget"] = max(numbers["budget"], least)
    bases = eigenbases(W, H)
    descent = _Descent([basis.W for basis in bases], [basis.h for basis in bases], numbers, tol)
    start = [torch.zeros_like(w) for w in descent.W]
    most = [float(h.max()) for h in descent.h]
    last, steps = descend(descent.smooth, descent.prox, start, most, descent.done, most_steps)
    return descent.solution(last, [basis.Q for basis in bases], steps)


@dataclass(frozen=True, eq=False)
class _Point:
    """The smooth part at one point: settled scalars, and the gradient when asked for."""

    residuals: list[Tensor]
    settled: Settled
    weights: list[Tensor]
    curvature: list[float]

    def gradient(self, g: int) -> Tensor:
        return -self.residuals[g] * self.weights[g]


@dataclass(frozen=True, eq=False)
class _GroupBound:
    """One group's terms of both values, and its dual matrix."""

    primal: float
    dual: float
    correction: DualCorrection


@dataclass(frozen=True, eq=False)
class _Bound:
    """A feasible point's value and a dual value, with the dual matrices."""

    primal: float
    dual: float
    corrections: tuple[DualCorrection, ...]

    @property
    def gap(self) -> float:
        return max(self.primal - self.dual, 0.0) / max(abs(self.primal), np.finfo(float).tiny)


class _Descent:
    """What `descend` needs, all in the eigenbases, and the way back from there."""

    def __init__(
        self, W: list[Tensor], h: list[Tensor], numbers: dict[str, Any], tol: float
    ) -> None:
        self.W, self.h, self.tol = W, h, tol
        self.constants = {name: value for name, value in numbers.items() if name != "budget"}
        self.mu, self.tau = numbers["mu"], numbers["tau"]
        widest = max(len(x) for x in h)
        padded = np.stack([np.pad(x.cpu().numpy(), (0, widest - len(x))) for x in h])
        names = ("lam", "kappa", "c", "k", "p", "b_min", "b_max", "budget")
        self.rates = Rates(**{name: numbers[name] for name in names}, h=padded)
        self.thresholders = [Thresholder((w.shape[0], w.shape[1]), w) for w in W]
        self.price = 0.0

    def smooth(self, Z: list[Tensor]) -> _Point:
        residuals = [w - z for w, z in zip(self.W, Z, strict=True)]
        energies = np.zeros_like(self.rates.h)
        for g, A in enumerate(residuals):
            energies[g, : A.shape[1]] = torch.linalg.vector_norm(A, dim=0).square().cpu().numpy()
        settled = settle(self.rates, energies, self.price)
        self.price = settled.price
        eigenvalues = 2.0 * settled.s[:, None] * saturation(self.rates, settled.s)
        weights = [
            torch.from_numpy(row[: len(h)]).to(h)
            for row, h in zip(eigenvalues, self.h, strict=True)
        ]
        return _Point(residuals, settled, weights, eigenvalues.max(axis=1).tolist())

    def prox(self, g: int, G: Tensor, L: float) -> Factored:
        if L == 0.0:  # H_s = 0: nothing pulls Z away from zero
            return Factored(G[:, :0], G.new_zeros(0), G.new_zeros((G.shape[1], 0)))
        if self.mu is not None:
            return self.thresholders[g].shrink(G, float(self.mu[g]) / L)
        return self.thresholders[g].project(G, float(self.tau[g]))

    def done(self, step: int, iterate: Iterate) -> bool:
        """Whether the gap is small enough, by an estimate first: it errs on the hopeful side."""
        if step % CHECK_EVERY or self.bound(iterate, spectral_norm_estimate).gap > self.tol:
            return False
        return self.bound(iterate, spectral_norm_bound).gap <= self.tol

    def bound(self, iterate: Iterate, norm: Norm) -> _Bound:
        """Primal value of an iterate and the dual value it leads to."""
        point: _Point = iterate.smooth
        s, nu = point.settled.s, point.settled.price
        parts = [self._group(g, iterate, point, norm) for g in range(len(self.W))]
        q = np.maximum(
            point.settled.energy / self.rates.kappa, self.rates.distortion(point.settled.bits)
        )
        primal = sum(part.primal for part in parts) + float(self.rates.lam @ q)
        rate = float(rate_value(self.rates, s, nu).sum()) - nu * self.rates.budget
        dual = sum(part.dual for part in parts) + rate
        return _Bound(primal, dual, tuple(part.correction for part in parts))

    def _group(self, g: int, iterate: Iterate, point: _Point, norm_of: Norm) -> _GroupBound:
        """Primal terms of Z and the misfit, dual terms of Y, and what makes Y feasible."""
        A, weight, factors = point.residuals[g], point.weights[g], iterate.factors[g]
        s = float(point.settled.s[g])
        # E = W - Z - R = (W - Z) 2 s / (2 s + h); where h = 0 it may be anything, R is zero there.
        share = torch.where(weight > 0, 2.0 * s / (2.0 * s + self.h[g]), 0.0)
        primal = 0.5 * float(((A * share).square() * self.h[g]).sum())
        mu = None if self.mu is None else float(self.mu[g])
        if mu is not None:
            primal += mu * factors.nuclear_norm
        Y = A * weight
        correction, near = equalize(Y, factors.V, factors.S, mu)
        Y, A = correction.unscaled(Y), correction.unscaled(A)
        # 1/2 tr(E H E^T) + ||Y||^2 / (4 s) = 1/2 sum Y^2 / H_s = 1/2 <Y, P (W - Z)>.
        inner, square = float((Y * self.W[g]).sum()), float((Y * A).sum())
        norm, most = norm_of(Y, near), 1.0
        if mu is None:
            inner -= float(self.tau[g]) * norm
        elif norm > 0:
            most = mu / norm
        scale = max(0.0, min(most, inner / square if square > 0 else 1.0))
        dual = scale * inner - 0.5 * scale * scale * square
        return _GroupBound(primal, dual, replace(correction, scale=scale))

    def solution(self, last: Iterate, Q: list[Tensor | None], steps: int) -> ProgramSolution:
        """The last iterate with its verified bound, back in the original coordinates."""
        bound = self.bound(last, spectral_norm_bound)
        point: _Point = last.smooth
        share = saturation(self.rates, point.settled.s)
        low_rank, residual = [], []
        for g, (factors, basis) in enumerate(zip(last.factors, Q, strict=True)):
            root = factors.S.sqrt()
            taken = torch.from_numpy(share[g, : len(self.h[g])]).to(self.h[g])
            R, right = point.residuals[g] * taken, (factors.V * root).T
            low_rank.append((factors.U * root, right if basis is None else right @ basis.T))
            residual.append(R if basis is None else R @ basis.T)
        return ProgramSolution(
            bound.primal,
            min(bound.dual, bound.primal),
            bound.gap,
            point.settled.price,
            tuple(point.settled.bits.tolist()),
            self.rates.budget,
            tuple(low_rank),
            tuple(residual),
            tuple(point.settled.s.tolist()),
            bound.corrections,
            self.constants,
            "optimal" if bound.gap <= self.tol else "stopped",
            steps,
        )
