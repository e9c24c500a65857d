"""Leading left singular vectors of A M for M M^T = H, without a root of H.

They are the leading eigenvectors of G = A H A^T, which needs products only. Small problems are
solved exactly in float64; large ones by randomized subspace iteration on a block Q (m, l),

    Q^T G Q = V diag(theta) V^T,   Q <- orth(T_d(2 G / theta_l - 1) Q V),

with the Chebyshev polynomial T_d as filter (d = 1 is plain iteration), stopped when another
round captures almost nothing more, and continued exactly if it does not settle, so that both
ways answer the same question. Working with G squares the spectrum: singular values below about
1e-8 of the greatest (3e-4 in float32) are not told apart from zero, which changes the sum of
sigma^2, the loss that low-rank fits minimize, by rounding only.

Sources: Halko, Martinsson, Tropp, arXiv 0909.4061 (randomized start); Zhou and Saad, SIAM J.
Matrix Anal. Appl. 29 (2007) (Chebyshev filter); QERA, arXiv 2410.06040 (the weighted problem).
Differs: no root or inverse root of H; warm start from an earlier basis.
"""

from __future__ import annotations

from math import log

import torch
from torch import Tensor

from convex_caldera.errors import NumericalError, RecipeError, ShapeError
from convex_caldera.linalg.finite import all_finite

EXACT_SIZE = 768  # min(m, n) up to which the exact way is used always
EXACT_SHARE = 0.25  # share of min(m, n) in the subspace from which it is cheaper anyway
MAX_ROUNDS = 60
SETTLED = 1e-2  # stop when a round adds less than this many times the last wanted Ritz value
MAX_DEGREE = 5  # of the Chebyshev filter between two Rayleigh-Ritz steps
LIFT = {torch.float64: 1e10, torch.float32: 1e4}  # greatest amplification by the filter
START_SEED = 0x5EED  # of the random start block, if no generator is given


def top_left_singular(
    A: Tensor,
    H: Tensor | None,
    rank: int,
    *,
    generator: torch.Generator | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """Orthonormal U (m, rank): the top left singular vectors of A M, where M M^T = H.

    Args:
        A: (m, n).
        H: positive semidefinite weight of the columns: (n, n), its diagonal (n,), or None for
            the identity.
        rank: 0 <= rank <= min(m, n).
        generator: CPU generator of the random start block; a fixed seed if None.
        start: (m, any) columns near the answer, such as the U of an earlier call.

    Returns:
        U in A's dtype, columns by descending singular value, sign arbitrary.

    Raises:
        RecipeError: rank out of range.
        ShapeError: A, H and start do not fit together.
        NumericalError: NaN or infinite entries.

    Cost: with k = min(m, n), exact (k <= 768, or rank > k / 5) 2 k n^2 + 4 m n k + 9 k^3 flops;
    otherwise about 3 to 20 products of 4 m n l + 2 n^2 l flops, l = rank + max(16, rank / 4).
    float64 on the CPU; float32 for the products on other devices, where float64 is far slower.
    """
    _check(A, H, rank, start)
    basis, _ = _leading(A, H, rank, generator, start)
    return basis[:, :rank].to(A.dtype)


def truncated_svd(
    A: Tensor,
    rank: int,
    *,
    generator: torch.Generator | None = None,
    start: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, rank), S (rank,), Vh (rank, n): the leading singular triples of A, in A's dtype.

    Arguments, errors and cost are those of `top_left_singular` with H = I; small matrices go to
    LAPACK in float64, so small singular values keep full relative accuracy there.
    """
    _check(A, None, rank, start)
    if _is_small(A, rank):
        U, S, Vh = torch.linalg.svd(A.double(), full_matrices=False)
    else:
        basis, _ = _leading(A, None, rank, generator, start)
        V, S, Vh = torch.linalg.svd(basis.T @ A.to(basis.dtype), full_matrices=False)
        U = basis @ V
    return U[:, :rank].to(A.dtype), S[:rank].to(A.dtype), Vh[:rank].to(A.dtype)


def _leading(
    A: Tensor,
    H: Tensor | None,
    rank: int,
    generator: torch.Generator | None,
    start: Tensor | None,
) -> tuple[Tensor, int]:
    """A basis (m, >= rank), best first, and the rounds taken (0 if exact)."""
    if not _is_small(A, rank):
        basis, rounds = _subspace_iteration(A, H, rank, generator, start)
        if basis is not None:
            return basis, rounds
    return _exact(A.double(), None if H is None else H.double()), 0


def _is_small(A: Tensor, rank: int) -> bool:
    least = min(A.shape)
    return least <= EXACT_SIZE or rank == 0 or _width(rank) >= EXACT_SHARE * least


def _width(rank: int) -> int:
    """Columns iterated: oversampling speeds convergence up on flat spectra."""
    return rank + max(16, rank // 4)


def _exact(A: Tensor, H: Tensor | None) -> Tensor:
    """All min(m, n) left singular vectors of A M, (m, min(m, n)), descending.

    For m > n, A = Q R reduces the eigenproblem to R H R^T (n, n).
    """
    m, n = A.shape
    Q, R = torch.linalg.qr(A) if m > n else (None, A)
    V: Tensor = torch.linalg.eigh(_weigh(R, H) @ R.T).eigenvectors.flip(1)
    return V if Q is None else Q @ V


def _subspace_iteration(
    A: Tensor,
    H: Tensor | None,
    rank: int,
    generator: torch.Generator | None,
    start: Tensor | None,
) -> tuple[Tensor | None, int]:
    """Ritz vectors of G = A H A^T (m, l), descending; None if they have not settled."""
    dtype = torch.float64 if A.device.type == "cpu" else torch.float32
    A, H = A.to(dtype), None if H is None else H.to(dtype)
    Q = _start_block(A, _width(rank), generator, start)
    captured = 0.0
    for rounds in range(1, MAX_ROUNDS + 1):
        Y = _gram_times(A, H, Q)
        theta, V = torch.linalg.eigh(_symmetric(Q.double().T @ Y.double()))
        theta, V = theta.flip(0), V.flip(1).to(dtype)
        Q, Y = Q @ V, Y @ V
        total = float(theta[:rank].sum())
        noise = 10 * torch.finfo(dtype).eps * total
        if rounds > 1 and total - captured <= SETTLED * float(theta[rank - 1]) + noise:
            return Q, rounds
        captured = total
        Q = torch.linalg.qr(_chebyshev(A, H, Q, Y, theta)).Q
    return None, MAX_ROUNDS


def _gram_times(A: Tensor, H: Tensor | None, Q: Tensor) -> Tensor:
    """G Q = A H A^T Q."""
    return A @ _weigh(Q.T @ A, H).T


def _chebyshev(A: Tensor, H: Tensor | None, Q: Tensor, Y: Tensor, theta: Tensor) -> Tensor:
    """T_d(2 G / b - 1) Q for b the least Ritz value: damps [0, b], lifts what is above it.

    Y = G Q is given. The degree keeps the lift of the greatest Ritz value below LIFT, as
    rounding errors along it are lifted too; d = 1 where the spectrum is steep, or b is nothing.
    """
    most, b = float(theta[0]), float(theta[-1])
    if b <= torch.finfo(Q.dtype).eps * most:
        return Y
    degree = int(log(LIFT[Q.dtype]) / log(4 * most / b))
    before, now = Q, Y * (2 / b) - Q
    for _ in range(min(degree, MAX_DEGREE) - 1):
        before, now = now, _gram_times(A, H, now) * (4 / b) - 2 * now - before
    return now


def _start_block(
    A: Tensor, width: int, generator: torch.Generator | None, start: Tensor | None
) -> Tensor:
    """Orthonormal (m, width): the columns of `start`, then random combinations of A's."""
    n = A.shape[1]
    if generator is None:
        generator = torch.Generator().manual_seed(START_SEED)
    known = A[:, :0] if start is None else start[:, :width].to(A)
    omega = torch.randn(n, width - known.shape[1], generator=generator, dtype=torch.float64)
    Q: Tensor = torch.linalg.qr(torch.cat([known, A @ omega.to(A)], dim=1)).Q
    return Q


def _weigh(A: Tensor, H: Tensor | None) -> Tensor:
    """A H."""
    if H is None:
        return A
    return A * H if H.dim() == 1 else A @ H


def _symmetric(A: Tensor) -> Tensor:
    return 0.5 * (A + A.T)


def _check(A: Tensor, H: Tensor | None, rank: int, start: Tensor | None) -> None:
    if A.dim() != 2:
        raise ShapeError(f"expected a matrix, got {tuple(A.shape)}")
    m, n = A.shape
    if H is not None and tuple(H.shape) not in ((n,), (n, n)):
        raise ShapeError(f"A is {(m, n)}, so H must be {(n,)} or {(n, n)}, got {tuple(H.shape)}")
    if start is not None and (start.dim() != 2 or start.shape[0] != m):
        raise ShapeError(f"A is {(m, n)}, so start must have {m} rows, got {tuple(start.shape)}")
    if not 0 <= rank <= min(m, n):
        raise RecipeError(f"rank {rank} is out of range for {m} x {n}: 0 to {min(m, n)}")
    if not all_finite(A) or (H is not None and not all_finite(H)):
        raise NumericalError(f"NaN or infinite entries in A {(m, n)} or its weight H")
