"""Low rank by convex relaxation: the nuclear norm under a metric, with a certificate.

    penalty:      min_Z  1/2 tr((A - Z) H (A - Z)^T) + mu ||Z||_*
    constrained:  min_Z  1/2 tr((A - Z) H (A - Z)^T)   s.t.  ||Z||_* <= tau

by accelerated proximal steps (linalg/proximal.py). For any E, with Y = E H,

    <Y, A> - 1/2 tr(E H E^T)   [ - tau ||Y||_2 ]        provided  ||Y||_2 <= mu   [no proviso]

is a lower bound; we take E = A - Z, sharpened (linalg/dual_norm.py), and bound the norm of Y
from above by a Cholesky factorization. Nothing is inverted, so singular H is fine. The solution
is shrunk; once its rank is known, `debias` refits that rank without shrinkage, which is the
projection of fit/low_rank.py.

For H = I these are singular value thresholding and projection on the nuclear ball.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from convex_caldera.errors import RecipeError
from convex_caldera.fit.low_rank import fit_low_rank
from convex_caldera.linalg.dual_norm import equalize, spectral_norm_bound, spectral_norm_estimate
from convex_caldera.linalg.proximal import Iterate, descend
from convex_caldera.linalg.rank_search import least_within
from convex_caldera.linalg.thresholding import Factored, Thresholder

CHECK_EVERY = 4
MOST_STEPS = 2000
RANK_PRECISION = 1.002  # ratio of the bracket's ends at which the search of mu stops
MU_RANGE = 1e-8  # mu is sought between this share of its largest useful value and that value
RANK_TOLERANCE = 1e-4  # relative gap at which the rank is read off during the search

Norm = Callable[[Tensor, Tensor | None], float]


@dataclass(frozen=True, eq=False)
class NuclearFit:
    """Z = left right, balanced, with primal and dual values of the stated program.

    gap = (primal - dual) / |primal| >= 0; `mu` is None in the constrained form.
    """

    left: Tensor
    right: Tensor
    primal: float
    dual: float
    gap: float
    mu: float | None
    steps: int

    @property
    def rank(self) -> int:
        return self.left.shape[1]


def fit_nuclear_norm(
    A: Tensor,
    H: Tensor | None,
    *,
    mu: float | None = None,
    tau: float | None = None,
    tol: float = 1e-6,
    most_steps: int = MOST_STEPS,
) -> NuclearFit:
    """Solve the penalty (mu) or the constrained (tau) form to relative gap `tol`.

    Args:
        A: (m, n) matrix to approximate.
        H: None for the identity, (n,) for a diagonal, (n, n) positive semidefinite.
        mu, tau: exactly one of them, >= 0.
        most_steps: stop here at the latest; the gap tells how far it came.

    Raises:
        RecipeError: not exactly one of mu and tau, or a negative one.

    Cost: per step one m x n x n product and one partial SVD; about twenty steps.
    """
    if (mu is None) == (tau is None) or min(mu or 0.0, tau or 0.0) < 0:
        raise RecipeError(f"give exactly one of mu and tau, >= 0; got mu={mu}, tau={tau}")
    fit = _Fit(A.double(), None if H is None else H.double(), mu, tau, tol)
    return fit.result(*fit.descend(torch.zeros_like(fit.A), most_steps))


def mu_for_rank(A: Tensor, H: Tensor | None, rank: int) -> float:
    """The least mu, to a fraction of a percent, whose penalty solution has at most that rank.

    Raises:
        RecipeError: rank out of range.

    Cost: about a dozen loose solutions of at most about the wanted rank, each begun at the last.
    """
    if not 0 <= rank <= min(A.shape):
        raise RecipeError(f"rank {rank} is out of range for a {tuple(A.shape)} matrix")
    A = A.double()
    high = spectral_norm_bound(_times(A, H))  # from here on Z = 0
    if rank == 0 or high == 0.0:
        return high
    fit = _Fit(A, None if H is None else H.double(), high, None, RANK_TOLERANCE)
    start = torch.zeros_like(A)

    def rank_at(mu: float) -> int:
        nonlocal start
        fit.mu = mu
        iterate, _ = fit.descend(start, MOST_STEPS)
        start = iterate.dense[0]
        return iterate.factors[0].rank

    return least_within(rank_at, rank, high, MU_RANGE * high, RANK_PRECISION)


def debias(A: Tensor, H: Tensor | None, rank: int) -> tuple[Tensor, Tensor]:
    """left (m, rank), right (rank, n): the best approximation of that rank, without shrinkage."""
    return fit_low_rank(A, H, rank)


def _times(E: Tensor, H: Tensor | None) -> Tensor:
    if H is None:
        return E
    return E * H if H.dim() == 1 else E @ H


@dataclass(frozen=True, eq=False)
class _Point:
    E: Tensor
    Y: Tensor
    curvature: Sequence[float]

    def gradient(self, g: int) -> Tensor:
        return -self.Y


class _Fit:
    """The pieces of `descend` for one matrix under a fixed H."""

    def __init__(
        self, A: Tensor, H: Tensor | None, mu: float | None, tau: float | None, tol: float
    ) -> None:
        self.A, self.H, self.mu, self.tau, self.tol = A, H, mu, tau, tol
        self.most = 1.0 if H is None else _largest_eigenvalue(H)
        self.thresholder = Thresholder((A.shape[0], A.shape[1]), A)

    def descend(self, start: Tensor, most_steps: int) -> tuple[Iterate, int]:
        """Accelerated steps from `start` until the gap is small enough."""
        return descend(self.smooth, self.prox, [start], [self.most], self.done, most_steps)

    def smooth(self, Z: list[Tensor]) -> _Point:
        E = self.A - Z[0]
        return _Point(E, _times(E, self.H), [self.most])

    def prox(self, g: int, G: Tensor, L: float) -> Factored:
        if L == 0.0:  # H = 0: nothing pulls Z away from zero
            return Factored(G[:, :0], G.new_zeros(0), G.new_zeros((G.shape[1], 0)))
        if self.mu is not None:
            return self.thresholder.shrink(G, self.mu / L)
        assert self.tau is not None
        return self.thresholder.project(G, self.tau)

    def done(self, step: int, iterate: Iterate) -> bool:
        if step % CHECK_EVERY or self._gap(iterate, spectral_norm_estimate) > self.tol:
            return False
        return self._gap(iterate, spectral_norm_bound) <= self.tol

    def _gap(self, iterate: Iterate, norm: Norm) -> float:
        primal, dual = self.values(iterate, norm)
        return max(primal - dual, 0.0) / max(abs(primal), torch.finfo(torch.float64).tiny)

    def values(self, iterate: Iterate, norm_of: Norm) -> tuple[float, float]:
        """Primal value, and the dual value of the sharpened and scaled residual."""
        point: _Point = iterate.smooth
        factors = iterate.factors[0]
        primal = 0.5 * float((point.E * point.Y).sum())
        correction, near = equalize(point.Y, factors.V, factors.S, self.mu)
        E, Y = correction.unscaled(point.E), correction.unscaled(point.Y)
        square, inner = float((E * Y).sum()), float((self.A * Y).sum())
        norm, most = norm_of(Y, near), 1.0
        if self.mu is not None:
            primal += self.mu * factors.nuclear_norm
            most = self.mu / norm if norm > 0 else 1.0
        else:
            assert self.tau is not None
            inner -= self.tau * norm
        scale = max(0.0, min(most, inner / square if square > 0 else 1.0))
        return primal, scale * inner - 0.5 * scale * scale * square

    def result(self, iterate: Iterate, steps: int) -> NuclearFit:
        primal, dual = self.values(iterate, spectral_norm_bound)
        factors = iterate.factors[0]
        root = factors.S.sqrt()
        gap = max(primal - dual, 0.0) / max(abs(primal), torch.finfo(torch.float64).tiny)
        return NuclearFit(
            factors.U * root, (factors.V * root).T, primal, min(primal, dual), gap, self.mu, steps
        )


def _largest_eigenvalue(H: Tensor) -> float:
    """An upper bound of the largest eigenvalue of H >= 0, within rounding of it."""
    return float(H.max()) if H.dim() == 1 else spectral_norm_bound(H)
