"""Proximal steps of the nuclear norm, by a partial SVD that is warm-started from the last one.

    shrink:   argmin_X 1/2 ||X - G||_F^2 + threshold ||X||_*    = U (S - threshold)_+ V^T
    project:  argmin_X 1/2 ||X - G||_F^2  s.t. ||X||_* <= radius  = U (S - theta)_+ V^T

with theta the threshold at which the sum of what is left equals the radius. Only singular values
above the threshold matter, so a block of right singular vectors a little wider than the rank is
carried from step to step and refreshed by subspace iteration; when its smallest value is still
above the threshold the block is widened. Near convergence of an outer loop one pass suffices,
because the block is already right. Small or high-rank matrices are decomposed whole, by their
shorter Gram matrix unless the threshold is so low that its rounding would show.

Source: Cai, Candes and Shen, arXiv 0810.3286 (thresholding); Halko, Martinsson and Tropp,
arXiv 0909.4061 (subspace iteration); Duchi et al., ICML 2008 (projection on the l1 ball).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

FULL_BELOW = 96  # below this least dimension a full SVD is faster than any iteration
FULL_SHARE = 0.4  # block width over least dimension from which a full SVD is cheaper
GRAM_RANGE = 1e-4  # least over largest singular value down to which a Gram matrix is accurate
SPARE = 8  # vectors carried beyond the rank; they let new directions enter


@dataclass(frozen=True, eq=False)
class Factored:
    """U diag(S) V^T, orthonormal columns U (m, r) and V (n, r), S (r,) descending, positive."""

    U: Tensor
    S: Tensor
    V: Tensor

    def dense(self) -> Tensor:
        return (self.U * self.S) @ self.V.T

    @property
    def nuclear_norm(self) -> float:
        return float(self.S.sum())

    @property
    def rank(self) -> int:
        return len(self.S)


class Thresholder:
    """Shrinks or projects a sequence of slowly changing matrices of one shape.

    Holds the block of right singular vectors between calls; `passes` subspace iterations
    refresh it at every call. The random start depends on the shape only.
    """

    def __init__(self, shape: tuple[int, int], like: Tensor, passes: int = 1):
        self.shape, self.passes = shape, passes
        self._block = like.new_zeros((shape[1], 0))
        self._generator = torch.Generator().manual_seed(shape[0] * 65537 + shape[1])

    def shrink(self, G: Tensor, threshold: float) -> Factored:
        """Soft thresholding of the singular values of G (m, n); threshold >= 0."""
        return self._apply(G, lambda S: threshold)

    def project(self, G: Tensor, radius: float) -> Factored:
        """Nearest matrix of nuclear norm at most `radius` (>= 0)."""
        return self._apply(G, lambda S: simplex_threshold(S, radius))

    def _apply(self, G: Tensor, threshold_of: Callable[[Tensor], float]) -> Factored:
        U, S, V = self._leading(G, threshold_of)
        threshold = threshold_of(S)
        rank = int((threshold < S).sum())
        return Factored(U[:, :rank], S[:rank] - threshold, V[:, :rank])

    def _leading(
        self, G: Tensor, threshold_of: Callable[[Tensor], float]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Singular triplets, at least all those above the threshold."""
        least = min(self.shape)
        width = max(self._block.shape[1], 2 * SPARE)
        fresh = self._block.shape[1] == 0
        while least > FULL_BELOW and width <= FULL_SHARE * least:
            block = self._widened(G, width)
            U, S, V = subspace_svd(G, block, self.passes + (2 if fresh else 0))
            above = int((threshold_of(S) < S).sum())
            if above + SPARE // 2 <= width:
                self._block = V[:, : min(width, above + 2 * SPARE)]
                return U, S, V
            self._block, width, fresh = V, 2 * width, True
        U, S, V = gram_svd(G)
        if threshold_of(S) < GRAM_RANGE * float(S[0]):
            U, S, Vh = torch.linalg.svd(G, full_matrices=False)
            V = Vh.T
        keep = int((threshold_of(S) < S).sum()) + SPARE
        self._block = V[:, :keep].contiguous()
        return U, S, V

    def _widened(self, G: Tensor, width: int) -> Tensor:
        missing = width - self._block.shape[1]
        if missing <= 0:
            return self._block
        noise = torch.randn(
            (self.shape[1], missing), generator=self._generator, dtype=torch.float64
        )
        return torch.cat([self._block, noise.to(G) / self.shape[1] ** 0.5], dim=1)


def subspace_svd(G: Tensor, block: Tensor, passes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Singular triplets of G restricted to the range of (G G^T)^(passes-1) G block.

    The triplets are those of Q Q^T G, so singular values never exceed the true ones.
    """
    Q = torch.linalg.qr(G @ block).Q
    for _ in range(passes - 1):
        Q = torch.linalg.qr(G @ torch.linalg.qr(G.T @ Q).Q).Q
    U, S, V = _wide_svd(Q.T @ G)
    return Q @ U, S, V


def gram_svd(G: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All U, S descending, V of G (m, n), by the eigenvectors of its shorter Gram matrix.

    Two to five times faster than an SVD. Below GRAM_RANGE of the largest, singular values and
    vectors are rounding; above, vectors of the longer side are orthogonal to 1e-8 at least, and
    all columns have norm 1, so that ||U S V^T||_* <= sum S holds whatever the rounding.
    """
    if G.shape[0] < G.shape[1]:
        V, S, U = gram_svd(G.T)
        return U, S, V
    V = torch.linalg.eigh(G.T @ G).eigenvectors.flip(1)
    columns = G @ V
    S, order = torch.linalg.vector_norm(columns, dim=0).sort(descending=True, stable=True)
    return columns[:, order] / S.clamp_min(torch.finfo(S.dtype).tiny), S, V[:, order]


def _wide_svd(B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, S descending, V of B (k, n), k < n, by the eigenvectors of B B^T.

    Four times faster than an SVD, and as good for singular values well above the root of the
    rounding unit times the largest; if there are smaller ones an SVD is taken.
    """
    U, S, V = gram_svd(B)
    if len(S) and float(S[-1]) <= GRAM_RANGE * float(S[0]):
        U, S, Vh = torch.linalg.svd(B, full_matrices=False)
        return U, S, Vh.T
    return U, S, V


def simplex_threshold(S: Tensor, radius: float) -> float:
    """theta >= 0 with sum (S - theta)_+ = radius for S descending; 0 if the sum is less."""
    total = torch.cumsum(S, 0)
    if len(S) == 0 or float(total[-1]) <= radius:
        return 0.0
    count = torch.arange(1, len(S) + 1, device=S.device, dtype=S.dtype)
    theta = (total - radius) / count
    last = int((theta < S).nonzero()[-1]) if bool((theta < S).any()) else 0
    return float(theta[last])
