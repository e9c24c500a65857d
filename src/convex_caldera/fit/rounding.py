"""Rounding with feedback: block LDLQ, of which GPTQ and nearest rounding are special cases.

With H = U D U^T, U unit upper in blocks of d columns, the loss of any rounding is

    tr((W - W^) H (W - W^)^T) = sum_j tr(e_j D_j e_j^T),   e = (W - W^) U,

so columns are rounded left to right, block j towards W_j + (W - W^)_{<j} U_{<j,j}: then e_j is
exactly the rounding error of block j. For d = 1 the codes are those of GPTQ in the same column
order (Chee et al., QuIP, arXiv 2307.13304, theorem 6); under a diagonal H feedback vanishes.
QuIP# (arXiv 2402.04396) writes the mirror image, last to first, with lower factors.

Refinement sweeps are Gauss-Seidel: block k is rounded to the minimiser over W^_k alone,
W^_k + (W - W^) H_k H_kk^-1, all others held. They never leave a better state behind than they
found only in exact arithmetic with a true nearest rounding under H_kk; so the driver, which
keeps the best state, is what guarantees it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from convex_caldera.core.protocols import FittedQuantizer

# Columns whose feedback is applied one quantizer block at a time; beyond it one GEMM serves.
PANEL = 128


def round_nearest(W: Tensor, fitted: FittedQuantizer) -> tuple[Tensor, Tensor]:
    """Codes and values of W (m, n) without feedback."""
    codes = fitted.encode(W)
    return codes, fitted.decode(codes)


def round_ldlq(W: Tensor, fitted: FittedQuantizer, unit_upper: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and values of W (m, n), each column block fed the error of those before it.

    Args:
        W: the target, (out_features, in_features).
        fitted: column quantizer; its block d must be the one `unit_upper` was made for.
        unit_upper: U (n, n) with identity d x d diagonal blocks and H = U D U^T.

    Cost: m n^2 multiply-adds, almost all in panels of 128 columns, plus mn/d encodings.
    """
    U = unit_upper.to(W.dtype)
    n, d = W.shape[1], fitted.quantizer.block
    panel = max(PANEL // d, 1) * d
    error, codes = torch.empty_like(W), []
    for a in range(0, n, panel):
        b = min(a + panel, n)
        target = W[:, a:b] + error[:, :a] @ U[:a, a:b]
        for j in range(a, b, d):
            cols = slice(j, min(j + d, b))
            goal = target[:, j - a : cols.stop - a] + error[:, a:j] @ U[a:j, cols]
            codes.append(fitted.encode(goal, j))
            error[:, cols] = W[:, cols] - fitted.decode(codes[-1], j).to(W.dtype)
    return torch.cat(codes, dim=1), W - error


def round_two_sided(
    W: Tensor, fitted: FittedQuantizer, unit_upper: Tensor, output_upper: Tensor, rows: int
) -> tuple[Tensor, Tensor]:
    """Codes and values of W under a Kronecker curvature O (x) H, tile by tile.

    With O = P C P^T and H = U D U^T (unit upper, blocks of `rows` and d), the loss is
    sum_IJ tr(C_I e_IJ D_J e_IJ^T), e = P^T (W - W^) U, so tile (I, J) is rounded towards W_IJ
    plus the feedback of all tiles above and to the left: with P = I this is LDLQ.

    Args:
        W: the target (m, n).
        fitted: quantizer with block d; its row_block divides `rows`.
        unit_upper: U (n, n), identity d x d diagonal blocks.
        output_upper: P (m, m), identity rows x rows diagonal blocks.
        rows: height of a tile.

    Source: Tseng et al., YAQA, arXiv 2505.22988, who feed back both sides at once; by column
    blocks first, the left side is one product per block. Cost: m n (m + n) multiply-adds and
    (m / rows) (n / d) small encodings.
    """
    U, P = unit_upper.to(W.dtype), output_upper.to(W.dtype)
    (m, n), d = W.shape, fitted.quantizer.block
    parts = [slice(i, min(i + rows, m)) for i in range(0, m, rows)]
    fitted_rows = [fitted.take_rows(part) for part in parts]
    error, codes = torch.empty_like(W), []
    for j in range(0, n, d):
        cols = slice(j, min(j + d, n))
        left = error[:, :j] @ U[:j, cols]
        carried = torch.empty_like(left)  # rows of P^T-feedback: (E U)_J of the tiles done
        column = []
        for part, sub in zip(parts, fitted_rows, strict=True):
            goal = W[part, cols] + left[part] + P[: part.start, part].T @ carried[: part.start]
            column.append(sub.encode(goal, j))
            error[part, cols] = W[part, cols] - sub.decode(column[-1], j).to(W.dtype)
            carried[part] = left[part] + error[part, cols]
        codes.append(torch.cat(column))
    return torch.cat(codes, dim=1), W - error


def refine(
    W: Tensor, codes: Tensor, W_hat: Tensor, fitted: FittedQuantizer, H: Tensor, sweeps: int
) -> tuple[Tensor, Tensor]:
    """`sweeps` Gauss-Seidel passes over the column blocks of a finished rounding.

    Args:
        W, codes, W_hat: target (m, n), its codes and their values; not changed in place.
        H: damped, (n, n).

    Cost: 2 m n^2 multiply-adds and mn/d encodings per sweep.
    """
    H = H.to(W.dtype)
    n, d = W.shape[1], fitted.quantizer.block
    panel = max(PANEL // d, 1) * d
    codes, W_hat = codes.clone(), W_hat.clone()
    width = _code_width(codes, n, d)
    inverses = [torch.linalg.inv(H[j : j + d, j : j + d]) for j in range(0, n, d)]
    for _ in range(sweeps):
        for a in range(0, n, panel):
            b = min(a + panel, n)
            gradient = (W - W_hat) @ H[:, a:b]
            for j in range(a, b, d):
                cols, local = slice(j, min(j + d, b)), slice(j - a, min(j + d, b) - a)
                goal = W_hat[:, cols] + gradient[:, local] @ inverses[j // d]
                new = fitted.encode(goal, j)
                values = fitted.decode(new, j).to(W.dtype)
                gradient -= (values - W_hat[:, cols]) @ H[cols, a:b]
                W_hat[:, cols] = values
                codes[:, j // d * width : j // d * width + new.shape[1]] = new
    return codes, W_hat


def _code_width(codes: Tensor, n: int, block: int) -> int:
    """Columns of the code tensor that one full block of weights takes."""
    return codes.shape[1] // -(-n // block)
