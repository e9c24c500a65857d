"""Low-rank terms for training: cut into a trained and a frozen part, and turned outwards.

Inside transforms T the term L R is T^-1(L R) = (B^-1 L)(R A) outside: both factors can be moved
out, which costs rank vectors a side instead of a rotation of every token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from convex_caldera.core.protocols import FittedTransform
from convex_caldera.core.terms import Coded, Dense, Factor, LowRank


def split(term: LowRank, rank: int) -> tuple[LowRank, LowRank | None]:
    """The first `rank` components and the others (None if there are none); both decode exactly.

    Coded factors keep their codes and scales. Where rows are coded together (trellis tiles) the
    term is not cut: all of it is the first part.
    """
    sides = [side for side in (term.left, term.right) if isinstance(side, Coded)]
    if rank >= term.rank or any(side.fitted.row_block > 1 for side in sides):
        return term, None
    first, rest = slice(0, rank), slice(rank, term.rank)
    return (
        LowRank(_take(term.left, first, 1), _take(term.right, first, 0)),
        LowRank(_take(term.left, rest, 1), _take(term.right, rest, 0)),
    )


def _take(factor: Factor, components: slice, axis: int) -> Factor:
    """Components of a factor; a dense left has them along axis 1, coded ones along axis 0."""
    if isinstance(factor, Dense):
        values = factor.values[:, components] if axis else factor.values[components]
        return Dense(values.contiguous())
    fitted = factor.fitted.take_rows(components)
    return replace(factor, codes=factor.codes[components].contiguous(), fitted=fitted)


def outer_left(left: Tensor, transforms: Sequence[FittedTransform]) -> Tensor:
    """B^-1 L (m, r), differentiable."""
    columns = left.T
    for transform in reversed(transforms):
        columns = transform.outputs(columns)
    return columns.T


def outer_right(right: Tensor, transforms: Sequence[FittedTransform]) -> Tensor:
    """R A (r, n), differentiable: the vector-Jacobian product of the linear map x -> A x."""
    rows = right
    for transform in reversed(transforms):
        with torch.enable_grad():
            x = torch.zeros_like(rows).requires_grad_()
            Ax = transform.inputs(x)
        (rows,) = torch.autograd.grad(
            Ax, x, rows, create_graph=torch.is_grad_enabled(), allow_unused=False
        )
    return rows
