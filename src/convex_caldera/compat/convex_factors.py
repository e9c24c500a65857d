"""The two factors of a low-rank part, in float16 or coded, with bits of their own."""

from __future__ import annotations

import torch
from torch import Tensor

from convex_caldera.compat.convex_params import ConvexCalderaParams
from convex_caldera.compat.convex_sizes import factor_quantizers
from convex_caldera.core.hessian import Hessian
from convex_caldera.core.protocols import Quantizer
from convex_caldera.core.recipe import FactorCoding
from convex_caldera.core.terms import Coded, Dense, Factor, LowRank
from convex_caldera.fit.backfit import dense_factors
from convex_caldera.fit.coded_factors import fit_coded_factors
from convex_caldera.fit.rounding import round_ldlq, round_nearest


def code_factors(
    A: Tensor, hessian: Hessian, left: Tensor, right: Tensor, params: ConvexCalderaParams
) -> LowRank | None:
    """Factors of A (m, n) near left (m, r) and right (r, n) as they are stored; None for rank 0.

    With equal bits both are coded in alternation under H (fit.coded_factors); with unequal ones
    the left first, then the right one refitted by least squares to what the left became.

    Raises:
        NumericalError: float16 cannot hold a factor.
    """
    if right.shape[0] == 0:
        return None
    of_left, of_right = factor_quantizers(params)
    if of_left is None and of_right is None:
        return dense_factors(left, right)
    if of_left is not None and params.left_bits == params.right_bits:
        upper = hessian.unit_upper(of_left.block)
        coding = FactorCoding(of_left)
        A, left, right = A.float(), left.float(), right.float()
        return fit_coded_factors(A, hessian.damped, upper, left, right, coding)
    return _code_apart(A, hessian, _balanced(left, right), of_left, of_right)


def _balanced(left: Tensor, right: Tensor) -> Tensor:
    """The left factor, each component's norm split evenly between both sides."""
    share = (right.norm(dim=1) / left.norm(dim=0).clamp(min=1e-30)).clamp(min=1e-30).sqrt()
    return left * share


def _code_apart(
    A: Tensor,
    hessian: Hessian,
    left: Tensor,
    of_left: Quantizer | None,
    of_right: Quantizer | None,
) -> LowRank:
    first: Factor
    if of_left is None:
        first = Dense(left.half())
        values = first.decode()
    else:
        transposed = left.T.float().contiguous()
        fitted = of_left.fit(transposed)
        codes, rows = round_nearest(transposed, fitted)
        first, values = Coded(codes, fitted), rows.T
    solution = torch.linalg.lstsq(values.double(), A.double()).solution.float()
    if of_right is None:
        return LowRank(first, Dense(solution.half()))
    fitted = of_right.fit(solution, importance=hessian.damped.diagonal())
    codes, _ = round_ldlq(solution, fitted, hessian.unit_upper(of_right.block))
    return LowRank(first, Coded(codes, fitted))
