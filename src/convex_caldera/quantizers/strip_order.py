"""Columns of every strip of rows in an order of its own, so that neighbours resemble each other.

    strip i of W, 64 rows:   W_i = V_i P_i,   V coded by `inner`,   P_i a permutation of columns

Trained query and key matrices have stripes; sorted by resemblance, groups of 64 consecutive
weights have more even magnitudes and vectors of neighbouring columns more structure. The order
is a greedy chain: the next column is the one nearest to the mean of the last 16 placed. Since
each strip has its own order this is no change of coordinates of the layer's input, hence no
transform, and feedback between columns is not possible: codes are nearest.

Source: "blockwise-permute" of ReALLM, arXiv 2405.13155, in its code. Differs: orders are
bijective by construction, cover all columns (the code leaves the last two and, where the window
is empty, the first sixteen in place), and take ceil(log2 n) bits an index unless 16 are asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from convex_caldera.coding.bitpack import pack_bits, packed_bytes, unpack_bits
from convex_caldera.core.protocols import FittedQuantizer, Quantizer
from convex_caldera.errors import FormatError, RecipeError, ShapeError
from convex_caldera.quantizers.groups import check_finite, check_matrix, checked_tensor
from convex_caldera.quantizers.nested import FittedNesting, Layout, Nesting, check_inner

WHOLE = 1 << 30  # columns that one call of `encode` consumes: all of them
MOST_COLUMNS = 1 << 16


@dataclass(frozen=True)
class StripOrder(Nesting):
    """Sort the columns of each strip of rows before another quantizer codes them.

    Args:
        inner: codes the sorted matrix.
        strip: rows that share an order.
        index_bits: 16, or 0 for as few as number the columns.

    Raises:
        RecipeError: an option out of range.
    """

    inner: Quantizer
    strip: int = 64
    index_bits: int = 0

    kind: ClassVar[str] = "strip_order"

    def __post_init__(self) -> None:
        if self.strip < 1 or self.index_bits not in (0, 16):
            raise RecipeError(
                f"strip must be positive and index_bits 0 or 16, got {self.strip} and "
                f"{self.index_bits}"
            )
        check_inner(self.inner, self.kind, ("strip_order",))

    @property
    def block(self) -> int:
        return WHOLE

    def width(self, columns: int) -> int:
        """Bits of an index; RecipeError beyond 65536 columns."""
        if columns > MOST_COLUMNS:
            raise RecipeError(f"strip_order numbers up to {MOST_COLUMNS} columns, got {columns}")
        return self.index_bits or max((columns - 1).bit_length(), 1)

    def strips(self, rows: int) -> int:
        return -(-rows // self.strip)

    def fit(
        self, W: Tensor, *, importance: Tensor | None = None, gain: float = 1.0
    ) -> FittedStripOrder:
        """Orders of W (m, n), and the inner quantizer fitted to the sorted matrix.

        Importance of columns reaches the inner quantizer as the mean over the strips.
        Cost: strip n^2 / 2 multiply-adds per strip.
        """
        from convex_caldera.quantizers.strip_kernels import chain

        check_matrix(W, importance, gain)
        shape = (W.shape[0], W.shape[1])
        self.width(shape[1])
        parts = W.float().cpu().split(self.strip)
        order = torch.stack([torch.from_numpy(chain(part.numpy())) for part in parts])
        spread = None if importance is None else importance.cpu()[order].mean(0).to(importance)
        inner = self.inner.fit(_sorted(W.float(), order, self.strip), importance=spread, gain=gain)
        return FittedStripOrder(replace(self, inner=inner.quantizer), shape, order, inner)

    def layout(self, shape: tuple[int, int]) -> Layout:
        """The orders as one bit stream, and what the inner quantizer stores."""
        indices = self.strips(shape[0]) * shape[1]
        size = packed_bytes(indices, self.width(shape[1]))
        return self.layout_around(shape, {"order": (torch.uint8, (size,))})

    def restore(self, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> FittedStripOrder:
        """From `FittedStripOrder.tensors()`; FormatError if an order is no permutation."""
        dtype, size = self.layout(shape)["order"]
        packed = checked_tensor(tensors, "order", size, dtype)
        rows, n = self.strips(shape[0]), shape[1]
        order = unpack_bits(packed, self.width(n), rows * n).view(rows, n).long()
        columns = torch.arange(n, device=order.device).expand(rows, n)
        if not torch.equal(order.sort(1).values, columns):
            raise FormatError(f"order does not list each of {n} columns once in every strip")
        inner = self.restored_inner(shape, tensors)
        return FittedStripOrder(self, shape, order, inner)


@dataclass(frozen=True, eq=False)
class FittedStripOrder(FittedNesting):
    """StripOrder with its orders (strips, n): column k of V_i is column order[i, k] of W_i."""

    quantizer: StripOrder
    shape: tuple[int, int]
    order: Tensor
    inner: FittedQuantizer

    @property
    def position_free(self) -> bool:
        return False

    def encode(self, x: Tensor, start: int = 0) -> Tensor:
        """Inner codes of the sorted matrix; x must have all columns."""
        if tuple(x.shape) != self.shape or start:
            raise ShapeError(
                f"strips are coded whole: all of {self.shape} expected, got {tuple(x.shape)} "
                f"from column {start}"
            )
        check_finite(x, "the matrix to encode")
        return self.inner.encode(_sorted(x.float(), self.order, self.quantizer.strip))

    def decode(self, codes: Tensor, start: int = 0) -> Tensor:
        """Values (m, n) with all columns back in their places."""
        if start:
            raise ShapeError(f"strips are decoded whole, not from column {start}")
        values = self.inner.decode(codes)
        return _sorted(values, self.order.argsort(1), self.quantizer.strip)

    def take_rows(self, rows: slice) -> FittedStripOrder:
        """Whole strips only; ShapeError otherwise."""
        start, stop, step = rows.indices(self.shape[0])
        strip = self.quantizer.strip
        if step != 1 or start % strip or (stop % strip and stop != self.shape[0]) or stop <= start:
            raise ShapeError(f"rows must be whole strips of {strip} of {self.shape[0]}, got {rows}")
        order = self.order[start // strip : -(-stop // strip)]
        shape = (stop - start, self.shape[1])
        return FittedStripOrder(self.quantizer, shape, order, self.inner.take_rows(rows))

    def tensors(self) -> dict[str, Tensor]:
        """`order` packed, and the inner tensors under "inner_"."""
        width = self.quantizer.width(self.shape[1])
        return {"order": pack_bits(self.order, width), **self.inner_tensors()}


def _sorted(W: Tensor, order: Tensor, strip: int) -> Tensor:
    """Column k of strip i becomes column order[i, k]."""
    rows = order.to(W.device).repeat_interleave(strip, 0)[: W.shape[0]]
    return W.gather(1, rows)
