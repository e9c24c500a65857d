"""Cholesky with a useful refusal, and the block factorization H = U D U^T behind LDLQ.

With C upper triangular and H = C C^T (the Cholesky factor of H read backwards), let C_jj be the
diagonal blocks of C. Then U_j = C_j C_jj^-1 has identity diagonal blocks and D_jj = C_jj C_jj^T,
so column block j receives feedback from the blocks before it through U[:j, j].

Source: QuIP, arXiv 2307.13304, section 3 (scalar); QuIP#, arXiv 2402.04396, section 4.1 (block).
Differs: the factor is upper, so that columns are rounded from left to right.
"""

from __future__ import annotations

import torch
from torch import Tensor

from convex_caldera.errors import NumericalError, ShapeError
from convex_caldera.linalg.finite import all_finite


def checked_cholesky(A: Tensor, name: str) -> Tensor:
    """Lower triangular L (n, n), float64, with L L^T = A; only the lower half of A is read.

    Raises:
        ShapeError: A is not square.
        NumericalError: A is not positive definite; the message names the matrix, its least
            eigenvalue and how much damping would make it so.

    Cost: n^3 / 3 flops, and an eigenvalue computation only on failure.
    """
    _check_square(A, name)
    L: Tensor
    L, info = torch.linalg.cholesky_ex(A.double())
    if int(info) != 0 or not all_finite(L.diagonal()):
        raise NumericalError(_indefinite(A.double(), name))
    return L


def block_ldl(H: Tensor, block: int, name: str = "H") -> tuple[Tensor, Tensor]:
    """U (n, n) with identity (block, block) diagonal blocks and D block diagonal: H = U D U^T.

    Blocks start at column 0; the last one is narrower when `block` does not divide n. Both
    results are dense float64.

    Raises:
        ShapeError: H is not square or block < 1.
        NumericalError: H is not positive definite.

    Cost: n^3 / 3 + n^2 block flops.
    """
    C = _upper_root(H, block, name)
    n = C.shape[0]
    D = torch.zeros_like(C)
    for j in range(0, n, block):
        cols = slice(j, min(j + block, n))
        D[cols, cols] = C[cols, cols] @ C[cols, cols].T
    return _normalize_blocks(C, block), D


def block_unit_upper(H: Tensor, block: int, name: str = "H") -> Tensor:
    """The factor U of `block_ldl` alone."""
    return _normalize_blocks(_upper_root(H, block, name), block)


def _upper_root(H: Tensor, block: int, name: str) -> Tensor:
    """C upper triangular with H = C C^T: reverse both axes, factor, reverse again."""
    _check_square(H, name)
    if block < 1:
        raise ShapeError(f"{name}: block must be at least 1, got {block}")
    return checked_cholesky(H.flip(0, 1), name).flip(0, 1)


def _normalize_blocks(C: Tensor, block: int) -> Tensor:
    """U_j = C_j C_jj^-1 for each column block, diagonal blocks exactly the identity."""
    n = C.shape[0]
    whole = n - n % block
    U = torch.empty_like(C)
    if whole:
        diagonal = C[:whole, :whole].reshape(whole // block, block, -1, block)
        inverses = _invert_upper(diagonal.diagonal(dim1=0, dim2=2).permute(2, 0, 1))
        columns = C[:, :whole].reshape(n, -1, block).transpose(0, 1)
        U[:, :whole] = (columns @ inverses).transpose(0, 1).reshape(n, whole)
    if whole < n:
        U[:, whole:] = C[:, whole:] @ _invert_upper(C[whole:, whole:])
    owner = torch.arange(n, device=C.device) // block
    U.masked_fill_(owner[:, None] >= owner[None, :], 0.0)
    U.diagonal().fill_(1.0)
    return U


def _invert_upper(C: Tensor) -> Tensor:
    """Inverses of small upper triangular matrices (..., b, b), by back substitution."""
    identity = torch.eye(C.shape[-1], dtype=C.dtype, device=C.device).expand(C.shape)
    inverse: Tensor = torch.linalg.solve_triangular(C, identity, upper=True)
    return inverse


def _check_square(A: Tensor, name: str) -> None:
    if A.dim() != 2 or A.shape[0] != A.shape[1]:
        raise ShapeError(f"{name}: expected a square matrix, got {tuple(A.shape)}")


def _indefinite(A: Tensor, name: str) -> str:
    """Why A has no Cholesky factor and which damping would give it one."""
    if not all_finite(A):
        return f"{name}: NaN or infinite entries, so no Cholesky factor; check the activations"
    spectrum = torch.linalg.eigvalsh(A)
    least, most = spectrum[0].item(), spectrum[-1].item()
    mean = A.diagonal().mean().item()
    rounding = len(A) * torch.finfo(torch.float64).eps * abs(most)
    missing = (max(-least, 0.0) + rounding) / (mean if mean > 0 else 1.0)
    return (
        f"{name}: not positive definite, least eigenvalue {least:.3e} (greatest {most:.3e}); "
        f"raise damping by more than {missing:.1e} (a fraction of the mean diagonal)"
    )
