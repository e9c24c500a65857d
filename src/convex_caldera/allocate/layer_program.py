"""The low-rank program of one layer at its plan's price, solved and written down compactly.

    min over Z, R   1/2 tr((W - Z - R) H (W - Z - R)^T) + mu ||Z||_* + lambda ||R||_F^2 / kappa

It is the penalty form of `program` for one layer whose bits the plan has fixed: what quantizing a
residual costs is proportional to its energy, so with loss l of the layer as stored,

    lambda = 1/2,   kappa = ||W||_F^2 / l,   s = lambda / kappa      (l / 2 if R is all of W).

A singular value of Z is worth its place if it saves more than its factors cost. Where H is large,
R takes the whole misfit and one of size sigma saves s sigma^2, at pi = nu (m + n) f / 2 for f bits
an entry; soft thresholding at mu / (2 s) keeps those of s sigma^2 > pi for

    mu = 2 sqrt(s pi),     nu the plan's price in loss a bit.

Its solution is the rank that the convex relaxation would buy. What is written is Z, as factors in
float16, and the constants: R = (W - Z) H (2 s I + H)^-1 and the dual matrix, which is the misfit
with the leading singular values of its product with H set to mu, follow from them. Both values are
those of this point, rounded factors included, with a margin for other machines' rounding.

Source: docs/certificate.md, section 6.
"""

from __future__ import annotations

import base64
import math
from typing import Any

import torch
from torch import Tensor

from convex_caldera.allocate.program import solve_program
from convex_caldera.linalg.dual_norm import equalize, spectral_norm_bound

LAM = 0.5
RIDGE_SHARE = 0.01  # of the mean of diag H; H itself may be singular
TOLERANCE = 5e-7
MOST_STEPS = 200
MARGIN = 1e-7  # of the primal value, given away on both sides


def layer_program(
    W: Tensor, H: Tensor, loss: float, price: float, factor_bits: int
) -> dict[str, Any] | None:
    """Solve a layer's program; the record of docs/certificate.md, section 6.

    Args:
        W: (m, n) weight.
        H: (n, n) positive semidefinite, undamped.
        loss: l > 0, in the unit of tr(E H E^T).
        price: nu > 0, in that unit a bit.
        factor_bits: f.

    Returns:
        None where loss or price is zero: then factors cost nothing, or there is nothing to save.

    Cost: one eigendecomposition and one Cholesky factorization of H, and about ten partial
    singular value decompositions and products of the size of W with H.
    """
    energy = float(W.double().square().sum())
    if not (loss > 0 and price > 0 and energy > 0):
        return None
    weight, H = W.double().cpu(), (0.5 * (H + H.T)).double().cpu()
    ridge = RIDGE_SHARE * float(H.diagonal().mean())
    damped = H + ridge * torch.eye(len(H), dtype=torch.float64)
    s = LAM * loss / energy
    mu = 2 * math.sqrt(s * 0.5 * price * sum(W.shape) * factor_bits)
    solution = solve_program(
        [weight], [damped], mu=mu, lam=LAM, kappa=energy / loss, c=0.0, k=1.0, p=0.0,
        b_min=0.0, b_max=0.0, budget=0.0, tol=TOLERANCE, most_steps=MOST_STEPS,
    )  # fmt: skip
    factors = [factor.to(torch.float16) for factor in solution.low_rank[0]]
    primal, dual = _values(weight, damped, factors[0].double(), factors[1].double(), s, mu)
    primal, dual = primal * (1 + MARGIN), dual - MARGIN * primal
    return {
        "rank": factors[0].shape[1],
        "factor_bits": factor_bits,
        "ridge": ridge,
        "lam": LAM,
        "kappa": energy / loss,
        "mu": mu,
        "primal": primal,
        "dual": dual,
        "gap": (primal - dual) / primal,
        "factors": base64.b64encode(b"".join(map(_bytes, factors))).decode(),
    }


def _values(
    W: Tensor, H: Tensor, left: Tensor, right: Tensor, s: float, mu: float
) -> tuple[float, float]:
    """Primal and dual value at Z = left right: docs/certificate.md, section 6."""
    n = len(H)
    root = torch.linalg.cholesky(H + 2 * s * torch.eye(n, dtype=H.dtype))
    rest = W - left @ right
    E = 2 * s * torch.cholesky_solve(rest.T, root).T
    Y = E @ H
    nuclear = 0.5 * float(left.square().sum() + right.square().sum())
    primal = 0.5 * float((Y * E).sum()) + mu * nuclear + s * float((rest - E).square().sum())
    correction, near = equalize(Y, torch.linalg.qr(right.T).Q, right.new_ones(len(right)), mu)
    E, Y = correction.unscaled(E), correction.unscaled(Y)
    norm = spectral_norm_bound(Y, near)
    scale = min(1.0, mu / norm) if norm > 0 else 1.0
    square = 0.5 * float((Y * E).sum()) + float(Y.square().sum()) / (4 * s)
    return primal, scale * float((Y * W).sum()) - scale * scale * square


def _bytes(factor: Tensor) -> bytes:
    return factor.contiguous().numpy().astype("<f2").tobytes()
