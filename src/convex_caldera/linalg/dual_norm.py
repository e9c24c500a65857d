"""Dual matrices of the nuclear norm: bounding their spectral norm, and sharpening them.

The dual of mu ||Z||_* asks for ||Y||_2 <= mu. A bound has to hold in floating point, so it is a
Cholesky factorization that succeeds, not a power iteration, which errs on the wrong side.

Sharpening: near the optimum Y = (W - Z) H_s has the singular vectors of Z with singular values
near mu. Scaling Y until the largest is mu lowers all of them, which costs the dual value
first-order. Setting each of them to mu, Y' = P Y with P = I - U diag(1 - mu / sigma) U^T, costs
second-order only. P acts from the left, hence commutes with every product by H from the right:
if Y = E H then Y' = (P E) H, so no inverse of H appears.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from convex_caldera.linalg.thresholding import FULL_SHARE, gram_svd, subspace_svd

SPARE = 8  # singular vectors looked at beyond those of Z
LEAST_EXCESS = 1e-11  # relative, above an estimate of the norm; far below any gap asked for
EXCESS_GROWTH = 16.0
COLD_STEPS, WARM_STEPS = 24, 3  # subspace iterations from a random block, and from a near one
LEAST_RAISED = 0.5  # share of mu below which a singular value is left alone


@dataclass(frozen=True, eq=False)
class DualCorrection:
    """E = scale (E0 - left diag(weights) left^T E0), left (m, r), weights (r,)."""

    scale: float
    left: Tensor
    weights: Tensor

    def apply(self, E0: Tensor) -> Tensor:
        return self.scale * self.unscaled(E0)

    def unscaled(self, E0: Tensor) -> Tensor:
        return E0 - (self.left * self.weights) @ (self.left.T @ E0)


def equalize(Y: Tensor, V: Tensor, S: Tensor, level: float | None) -> tuple[DualCorrection, Tensor]:
    """P of the module's note, unscaled, and the level; V (n, r), S (r,) are factors of Z.

    The leading singular values of Y, as many as Z has, are set to `level` (mu; None for the
    mean weighted by S, which is what the constrained form asks for); further ones above it too.
    """
    width = V.shape[1] + SPARE
    if width > FULL_SHARE * min(Y.shape):
        U, sigma, _ = gram_svd(Y)
    else:
        noise = torch.randn(
            (Y.shape[1], SPARE), generator=torch.Generator().manual_seed(width), dtype=Y.dtype
        )
        U, sigma, _ = subspace_svd(Y, torch.cat([V, noise.to(Y)], dim=1), 2)
    rank = min(V.shape[1], len(sigma))
    if level is None:
        level = float(sigma[:rank] @ S[:rank] / S.sum()) if rank else float("inf")
    change = torch.where(sigma > LEAST_RAISED * level, 1.0 - level / sigma, 0.0)
    change[rank:] = change[rank:].clamp_min(0.0)
    keep = change != 0.0
    return DualCorrection(1.0, U[:, keep], change[keep]), U


def spectral_norm_bound(Y: Tensor, near: Tensor | None = None) -> float:
    """An upper bound of ||Y||_2, verified: a Cholesky factorization of bound^2 I - Y Y^T exists.

    Starts a hair above the estimate and widens until the factorization succeeds, with room for
    its own rounding (Rump, BIT 46, 2006).

    Args:
        Y: (m, n).
        near: (m, k) approximate leading left singular vectors, if known.

    Cost: one Gram matrix of the shorter side and a few Cholesky factorizations of it.
    """
    gram = _gram(Y)
    trace = float(gram.diagonal().sum())
    if trace == 0.0:
        return 0.0
    eps = torch.finfo(Y.dtype).eps
    # Rounding of the Gram matrix and of Cholesky, relative to the trace they act on.
    slack = (len(gram) + max(Y.shape) + 4) * eps * trace
    estimate, excess = _estimate(gram, _near(Y, near)), LEAST_EXCESS
    while not _dominates((estimate * (1.0 + excess)) ** 2, gram):
        excess *= EXCESS_GROWTH
    return float((((estimate * (1.0 + excess)) ** 2 + slack) * (1.0 + 4.0 * eps)) ** 0.5)


def spectral_norm_estimate(Y: Tensor, near: Tensor | None = None) -> float:
    """||Y||_2 from below, by subspace iteration on Y Y^T from `near`, or from a random block."""
    return _estimate(_gram(Y), _near(Y, near))


def _gram(Y: Tensor) -> Tensor:
    return Y @ Y.T if Y.shape[0] <= Y.shape[1] else Y.T @ Y


def _near(Y: Tensor, near: Tensor | None) -> Tensor | None:
    return near if near is None or Y.shape[0] <= Y.shape[1] else Y.T @ near


def _dominates(square: float, gram: Tensor) -> bool:
    """Whether square I - gram is positive definite, as far as a factorization can tell."""
    shifted = -gram
    shifted.diagonal().add_(square)
    return int(torch.linalg.cholesky_ex(shifted).info) == 0


def _estimate(gram: Tensor, near: Tensor | None) -> float:
    generator = torch.Generator().manual_seed(len(gram))
    width = min(SPARE, len(gram))
    Q = torch.randn((len(gram), width), generator=generator, dtype=torch.float64).to(gram)
    steps = COLD_STEPS
    if near is not None and 0 < near.shape[1] + width <= FULL_SHARE * len(gram):
        Q, steps = torch.cat([near, Q], dim=1), WARM_STEPS
    for _ in range(steps):
        Q = torch.linalg.qr(gram @ Q).Q
    top = torch.linalg.eigvalsh(Q.T @ gram @ Q)[-1]
    return float(top.clamp_min(0.0)) ** 0.5
