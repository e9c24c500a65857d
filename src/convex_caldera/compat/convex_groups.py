"""Groups of columns, what they may be stored as, and rounding across them with feedback.

H = U D U^T in blocks of one group's width (linalg.factor), so with e = (W - W^) U

    tr((W - W^) H (W - W^)^T) = sum_g tr(e_g D_g e_g^T),

and groups rounded in turn, each towards W_g + (W - W^)_{<g} U_{<g,g}, have additive losses: what
is measured group by group is what the matrix loses. Inside a group the same is done column by
column, which is GPTQ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from convex_caldera.compat.convex_params import DENSE_BITS
from convex_caldera.core.hessian import Hessian
from convex_caldera.core.terms import Coded, Dense
from convex_caldera.errors import NumericalError
from convex_caldera.fit.rounding import round_ldlq
from convex_caldera.linalg.factor import block_ldl, block_unit_upper
from convex_caldera.linalg.finite import all_finite
from convex_caldera.quantizers.groups import PER_ROW, PER_TENSOR
from convex_caldera.quantizers.uniform import Uniform

FINE_SCALES = (128, 64)


@dataclass(frozen=True, eq=False)
class Columns:
    """One group: its columns, their H (w, w), and D and U of the feedback inside the group."""

    place: slice
    H: Tensor
    D: Tensor
    unit_upper: Tensor

    @property
    def width(self) -> int:
        return len(self.H)


@dataclass(frozen=True, eq=False)
class ColumnGroups:
    """All groups of one matrix and U (n, n), the feedback between them."""

    groups: tuple[Columns, ...]
    unit_upper: Tensor

    def __len__(self) -> int:
        return len(self.groups)


def column_groups(hessian: Hessian, count: int) -> ColumnGroups:
    """At most `count` runs of columns, equal but for the last, under the damped H."""
    H, n = hessian.damped, len(hessian)
    width = math.ceil(n / count)
    U, D = block_ldl(H, width, hessian.name)
    groups = []
    for start in range(0, n, width):
        place = slice(start, min(start + width, n))
        inner = D[place, place]
        groups.append(
            Columns(place, H[place, place], inner, block_unit_upper(inner, 1, hessian.name))
        )
    return ColumnGroups(tuple(groups), U)


@dataclass(frozen=True, order=True)
class Format:
    """How a group may be stored: code bits (16 is float16), and columns that share a scale."""

    bits: int
    scales: int = PER_TENSOR

    @property
    def label(self) -> str:
        names = {PER_TENSOR: "one scale", PER_ROW: "a scale a row"}
        if self.bits == DENSE_BITS:
            return "float16"
        return f"{self.bits} bits, {names.get(self.scales, f'a scale in {self.scales}')}"

    @property
    def quantizer(self) -> Uniform:
        # One bit is +-s: an affine grid of two levels would have to hold zero.
        # bfloat16 scales: what low rank leaves over may be too small for float16's range.
        return Uniform(self.bits, self.scales, symmetric=self.bits == 1, scale_dtype="bfloat16")

    def stored_bits(self, shape: tuple[int, int]) -> int:
        """Bits that a group of this shape takes."""
        if self.bits == DENSE_BITS:
            return DENSE_BITS * math.prod(shape)
        layout = self.quantizer.layout(shape).values()
        return 8 * sum(math.prod(size) * dtype.itemsize for dtype, size in layout)


def formats(widths: Sequence[int], columns: int, per_channel: bool) -> list[Format]:
    """The menu of one group of `columns` columns, the least first."""
    fine = [size for size in FINE_SCALES if size < columns]
    scales = (PER_ROW,) if per_channel else (PER_TENSOR, PER_ROW, *fine)
    menu = [Format(bits, scale) for bits in widths if bits < DENSE_BITS for scale in scales]
    return menu + [Format(DENSE_BITS) for bits in widths if bits == DENSE_BITS]


def round_group(target: Tensor, group: Columns, how: Format) -> tuple[Coded | Dense, Tensor]:
    """The stored part and its values (m, w) of one group.

    Raises NumericalError where float16 cannot hold the entries.
    """
    if how.bits == DENSE_BITS:
        dense = Dense(target.half())
        if not all_finite(dense.values):
            raise NumericalError("entries exceed float16; leave 16 out of discrete_bits")
        return dense, dense.decode()
    fitted = how.quantizer.fit(target, importance=group.D.diagonal())
    codes, values = round_ldlq(target, fitted, group.unit_upper)
    return Coded(codes, fitted), values


def group_loss(target: Tensor, values: Tensor, group: Columns) -> float:
    """tr(e_g D_g e_g^T), float64."""
    error = target.double() - values.double()
    return float(((error @ group.D) * error).sum())


def measured(A: Tensor, group: Columns, menu: Sequence[Format]) -> dict[Format, float]:
    """The loss of each format on one group of A (m, n)."""
    target = A[:, group.place].contiguous()
    return {how: group_loss(target, round_group(target, group, how)[1], group) for how in menu}


def round_groups(
    A: Tensor, groups: ColumnGroups, chosen: Sequence[Format]
) -> tuple[tuple[Coded | Dense, ...], Tensor]:
    """Parts and values (m, n) of A, every group fed the errors of those before it."""
    U = groups.unit_upper.to(A.dtype)
    error, parts = torch.zeros_like(A), []
    for group, how in zip(groups.groups, chosen, strict=True):
        place = group.place
        before = slice(0, place.start)
        target = A[:, place] + error[:, before] @ U[before, place]
        part, values = round_group(target, group, how)
        error[:, place] = A[:, place] - values
        parts.append(part)
    return tuple(parts), A - error
