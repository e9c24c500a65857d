"""The best low-rank term under a metric, without inverting or even forming a root.

min tr((A - X) H (A - X)^T) over rank(X) <= r is solved by X = U U^T A with U the top r left
singular vectors of A M for any M M^T = H, that is, the top eigenvectors of A H A^T. One function
under three metrics is the SVD (H = I), LQER's scaled SVD (diagonal) and QERA-exact, which is
also CALDERA's rank-constrained regression (full). The loss left is the sum of the squared
singular values dropped (Eckart-Young).
"""

from __future__ import annotations

import torch
from torch import Tensor

from convex_caldera.core.hessian import Hessian
from convex_caldera.core.recipe import Metric
from convex_caldera.errors import RecipeError
from convex_caldera.linalg.svd import top_left_singular


def metric_matrix(hessian: Hessian, metric: Metric) -> Tensor | None:
    """What a step may see: None for identity, (n,) for a diagonal metric, (n, n) damped H."""
    if metric == "identity":
        return None
    if metric == "diagonal":
        return hessian.damped.diagonal()
    if metric == "full":
        return hessian.damped
    statistic = hessian.statistics.get(metric)
    if statistic is None:
        known = ", ".join(sorted(hessian.statistics)) or "none"
        raise RecipeError(f"{hessian.name}: statistic {metric!r} was not collected (have: {known})")
    return statistic.double() ** 2


def fit_low_rank(
    A: Tensor,
    H: Tensor | None,
    rank: int,
    start: Tensor | None = None,
    output_root: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Factors left (m, rank), orthonormal columns, and right (rank, n) of the best X.

    Args:
        A: matrix to approximate, usually a residual.
        H: None, (n,) or (n, n), from `metric_matrix`.
        rank: 0 <= rank <= min(m, n).
        start: (m, rank) guess for the left factor (warm start of the subspace iteration).
        output_root: lower triangular M (m, m) with M M^T = O, for tr(O (A - X) H (A - X)^T):
            then X solves the problem for M^T A and left is not orthonormal.

    Raises:
        RecipeError: rank out of range.

    Source: Zhang et al., QERA, arXiv 2410.06040; Saha et al., CALDERA, arXiv 2405.18886,
    lemma 4.2. Both invert the root of H; here nothing is inverted, so singular H is fine.
    """
    if not 0 <= rank <= min(A.shape):
        raise RecipeError(f"rank {rank} is out of range for a {tuple(A.shape)} matrix")
    if output_root is None:
        left = top_left_singular(A, H, rank, start=start)
        return left, left.T @ A
    turned = output_root.T @ A
    start = None if start is None else output_root.T @ start
    left = top_left_singular(turned, H, rank, start=start)
    return torch.linalg.solve_triangular(output_root.T, left, upper=True), left.T @ turned
