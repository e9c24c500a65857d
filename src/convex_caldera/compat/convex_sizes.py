"""Every bit that one matrix may spend, from shapes alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

from convex_caldera.compat.convex_groups import ColumnGroups, Columns, Format, formats
from convex_caldera.compat.convex_params import DENSE_BITS, ConvexCalderaParams
from convex_caldera.core.protocols import Quantizer
from convex_caldera.errors import InfeasibleBudgetError
from convex_caldera.quantizers.e8p import E8P
from convex_caldera.quantizers.uniform import Uniform

LATTICE_BITS = (2, 3, 4)


def factor_quantizers(params: ConvexCalderaParams) -> tuple[Quantizer | None, Quantizer | None]:
    """Of the left and the right factor; None is float16.

    E8P where both have the same 2 to 4 bits, as components are then rotated to equal energy;
    a uniform grid per component elsewhere.
    """
    both = (params.left_bits, params.right_bits)
    if both[0] == both[1] and both[0] in LATTICE_BITS:
        return E8P(both[0]), E8P(both[1])
    left, right = (
        None if bits == DENSE_BITS else Uniform(bits, 0, scale_dtype="bfloat16") for bits in both
    )
    return left, right


@dataclass(frozen=True, eq=False)
class Sizes:
    """The budget of a matrix (m, n) and what its parts cost, in bits.

    `reference` are the formats with the fewest scales, one per code width on offer.
    """

    params: ConvexCalderaParams
    shape: tuple[int, int]
    groups: ColumnGroups
    reference: tuple[Format, ...]

    @classmethod
    def of(cls, params: ConvexCalderaParams, shape: tuple[int, ...], groups: ColumnGroups) -> Sizes:
        m, n = shape
        coarsest: dict[int, Format] = {}
        for how in formats(params.widths, n, params.per_channel):
            coarsest.setdefault(how.bits, how)
        return cls(params, (m, n), groups, tuple(coarsest.values()))

    @property
    def total(self) -> int:
        """All bits that may be stored: B_tot per original weight, in whole bytes."""
        return 8 * int(self.params.B_tot * math.prod(self.shape) / 8)

    @property
    def code_range(self) -> tuple[float, float]:
        """b_min and b_max, as far as there are widths."""
        return float(self.params.widths[0]), float(self.params.widths[-1])

    @property
    def least_codes(self) -> int:
        """Bits of all groups in the least format."""
        return sum(self.reference[0].stored_bits(self._block(g)) for g in self.groups.groups)

    def weights(self, group: Columns) -> int:
        return self.shape[0] * group.width

    def menu(self, group: Columns) -> list[Format]:
        return formats(self.params.widths, group.width, self.params.per_channel)

    def stored_bits(self, group: Columns, how: Format) -> int:
        return how.stored_bits(self._block(group))

    def factor_bits(self, rank: int) -> int:
        """Bits of both factors, the left one stored as its transpose where it is coded."""
        if rank == 0:
            return 0
        m, n = self.shape
        left, right = factor_quantizers(self.params)
        return _factor_bits(left, (rank, m)) + _factor_bits(right, (rank, n))

    def most_rank(self, limit: int | None) -> int:
        """The largest rank whose factors leave room for the least codes.

        Raises:
            InfeasibleBudgetError: not even the codes alone fit; names the least B_tot.
        """
        room = self.total - self.least_codes
        if room < 0:
            least = self.least_codes
            raise InfeasibleBudgetError(
                f"B_tot = {self.params.B_tot} bits per weight is below the least feasible "
                f"{least / math.prod(self.shape):.4f} ({self.reference[0].label}, scales counted); "
                "raise B_tot, or offer fewer bits by b_min and discrete_bits",
                least,
            )
        most = min(self.shape) if limit is None else min(limit, *self.shape)
        while most and self.factor_bits(most) > room:
            most = min(most - 1, most * room // self.factor_bits(most) + 1)
        return most

    def code_budget(self, rank: int) -> float:
        """What sum p_g b_g may spend: without scales and without the factors of this rank."""
        side = self.least_codes - self.code_range[0] * math.prod(self.shape)
        return self.total - self.factor_bits(rank) - side

    def _block(self, group: Columns) -> tuple[int, int]:
        return self.shape[0], group.width


def _factor_bits(quantizer: Quantizer | None, shape: tuple[int, int]) -> int:
    if quantizer is None:
        return DENSE_BITS * math.prod(shape)
    layout = quantizer.layout(shape).values()
    return 8 * sum(math.prod(size) * dtype.itemsize for dtype, size in layout)
