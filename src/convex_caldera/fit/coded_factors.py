"""LPLR: a low-rank term whose factors are themselves coded.

Alternates  L <- argmin tr((A - L R^) H (.)^T) = A H R^T (R H R^T)^-1,  rounded, and
R <- argmin = (L^T L)^-1 L^T A,  rounded, and keeps the best pair (Saha et al., CALDERA,
arXiv 2405.18886, algorithm 2, after arXiv 2310.11028). L is coded as its transpose, so that
blocks of 8 run along the long side.

Where this differs: (i) singular values are split evenly between the factors and the components
rotated by an orthogonal matrix, so that every row of both factors has the same energy. Rounding
noise of relative size D then costs D (sum s_i)^2 / r instead of D sum s_i^2 (Cauchy-Schwarz: no
other split does better). (ii) With `feedback`, R is rounded by LDLQ under H and L under R H R^T,
the true metrics of both subproblems, instead of to the nearest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from convex_caldera.core.recipe import FactorCoding
from convex_caldera.core.terms import Coded, LowRank
from convex_caldera.fit.rounding import round_ldlq, round_nearest
from convex_caldera.linalg.factor import block_unit_upper
from convex_caldera.linalg.hadamard import rotate

# Ridge on the small Gram matrices, as a fraction of their mean diagonal: keeps a vanishing
# component from making the least-squares step blow up.
GRAM_RIDGE = 1e-7


def fit_coded_factors(
    A: Tensor,
    H: Tensor,
    unit_upper: Tensor | None,
    left: Tensor,
    right: Tensor,
    coding: FactorCoding,
    output: Tensor | None = None,
) -> LowRank:
    """Code a given factorization of A under H, alternating least squares and rounding.

    Args:
        A: the matrix (m, n) that left @ right approximates.
        H: metric (n, n), damped.
        unit_upper: U of H = U D U^T in blocks of the factors' quantizer; None without feedback.
        left, right: (m, r) and (r, n), from `fit_low_rank`, r >= 1.
        coding: quantizer, number of alternations, rounding rule.
        output: O (m, m), damped, of a Kronecker curvature; the identity if absent.

    Returns:
        The best of all rounded pairs under H.

    The loss that ranks them is tr(O A H A^T) - 2 tr(L^T O A H R^T) + tr(L^T O L R H R^T), of which
    only the last two terms change, and both are by-products of the next alternation.

    Cost: per alternation two r x r solves, 2 m n r and n^2 r multiply-adds, two roundings.
    """
    H = H.to(A.dtype)
    O = None if output is None else output.to(A.dtype)
    left, right = _balance(left, right, H) if coding.balanced else (left, right)
    AH = A @ H
    gram, cross = right @ H @ right.T, AH @ right.T
    best: tuple[float, LowRank] | None = None
    for _ in range(coding.iterations):
        coded_left, left = _code_left(_solve(gram, cross.T).T, gram, coding)
        weighted = left if O is None else O @ left
        inner = left.T @ weighted
        coded_right, right = _code_right(_solve(inner, weighted.T @ A), unit_upper, coding)
        gram, cross = right @ H @ right.T, AH @ right.T
        served = 2 * _dot(weighted, cross) - _dot(inner, gram)
        if best is None or served > best[0]:
            best = (served, LowRank(coded_left, coded_right))
    assert best is not None  # iterations >= 1 by construction of FactorCoding
    return best[1]


def _balance(left: Tensor, right: Tensor, H: Tensor) -> tuple[Tensor, Tensor]:
    """Split singular values evenly and rotate components to equal energy."""
    gram = (right @ H @ right.T).double()
    energy, basis = torch.linalg.eigh(0.5 * (gram + gram.T))
    most = float(energy[-1])
    # where H is zero (inputs that never were anything else) any split will do
    share = energy.clamp(min=most * 1e-12) ** 0.25 if most > 0 else torch.ones_like(energy)
    left = rotate((left.double() @ basis) * share)
    right = rotate(((basis.T @ right.double()) / share[:, None]).T).T
    return left.to(H.dtype), right.to(H.dtype)


def _dot(A: Tensor, B: Tensor) -> float:
    """tr(A^T B), summed in float64."""
    return float((A * B).sum(dtype=torch.float64))


def _solve(gram: Tensor, rhs: Tensor) -> Tensor:
    """gram^-1 rhs for a small positive semidefinite Gram matrix, float64, slightly damped."""
    G = gram.double()
    ridge = GRAM_RIDGE * float(G.diagonal().mean()) + 1e-300
    G = G + ridge * torch.eye(len(G), dtype=G.dtype, device=G.device)
    return torch.cholesky_solve(rhs.double(), torch.linalg.cholesky(G)).to(gram.dtype)


def _code_right(R: Tensor, unit_upper: Tensor | None, coding: FactorCoding) -> tuple[Coded, Tensor]:
    fitted = coding.quantizer.fit(R)
    if coding.feedback and unit_upper is not None:
        codes, values = round_ldlq(R, fitted, unit_upper)
    else:
        codes, values = round_nearest(R, fitted)
    return Coded(codes, fitted), values


def _code_left(L: Tensor, gram: Tensor, coding: FactorCoding) -> tuple[Coded, Tensor]:
    """Round L^T (r, m); with feedback its rows, the components, are fed each other's error."""
    transposed = L.T.contiguous()
    fitted = coding.quantizer.fit(transposed)
    if not coding.feedback:
        codes, values = round_nearest(transposed, fitted)
        return Coded(codes, fitted), values.T
    rows = fitted.row_block
    G = gram.double()
    G = G + 1e-6 * float(G.diagonal().mean()) * torch.eye(len(G), dtype=G.dtype, device=G.device)
    U = block_unit_upper(G, rows, "R H R^T").to(L.dtype)
    error, pieces = torch.zeros_like(transposed), []
    for i in range(0, len(transposed), rows):
        part = slice(i, min(i + rows, len(transposed)))
        sub = fitted.take_rows(part)
        pieces.append(sub.encode(transposed[part] + U[:i, part].T @ error[:i]))
        error[part] = transposed[part] - sub.decode(pieces[-1]).to(L.dtype)
    return Coded(torch.cat(pieces), fitted), (transposed - error).T
