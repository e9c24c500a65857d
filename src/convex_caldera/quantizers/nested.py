"""Quantizers around others: which may hold which, and what of the inner one is stored.

Codes are the inner quantizer's own; its tensors are stored under the prefix "inner_".
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from convex_caldera.core.protocols import FittedQuantizer, Quantizer
from convex_caldera.errors import RecipeError
from convex_caldera.quantizers.groups import checked_tensor

INNER = "inner_"
Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


class Nesting:
    """A quantizer around another one; for frozen dataclasses with a field `inner`."""

    inner: Quantizer

    @property
    def bits(self) -> float:
        """Code bits a weight, those of the inner quantizer."""
        bits: float = self.inner.bits  # type: ignore[attr-defined]
        return bits

    @property
    def borrows(self) -> Layout:
        """Tensors that `restore` needs and another layer stores."""
        return _prefixed(borrowed_by(self.inner))

    def layout_around(self, shape: tuple[int, int], own: Layout) -> Layout:
        """Codes of the inner quantizer, own tensors, and the inner one's others."""
        inner = self.inner.layout(shape)
        return {"codes": inner.pop("codes"), **own, **_prefixed(inner)}

    def restored_inner(
        self, shape: tuple[int, int], tensors: Mapping[str, Tensor]
    ) -> FittedQuantizer:
        """The inner quantizer, its tensors checked here so that messages name them whole.

        Raises FormatError for one that is missing, or of another dtype or shape.
        """
        wanted = {**self.inner.layout(shape), **borrowed_by(self.inner)}
        found = {
            name: checked_tensor(tensors, INNER + name, size, dtype)
            for name, (dtype, size) in wanted.items()
            if name != "codes"
        }
        return self.inner.restore(shape, found)


class FittedNesting:
    """A fitted quantizer whose codes are those of `inner`; for frozen dataclasses."""

    inner: FittedQuantizer

    @property
    def row_block(self) -> int:
        return self.inner.row_block

    def pack(self, codes: Tensor) -> Tensor:
        return self.inner.pack(codes)

    def unpack(self, packed: Tensor) -> Tensor:
        return self.inner.unpack(packed)

    def inner_tensors(self) -> dict[str, Tensor]:
        """What the inner quantizer stores, as it is named here."""
        return {INNER + name: tensor for name, tensor in self.inner.tensors().items()}


def check_inner(inner: Quantizer, kind: str, refused: tuple[str, ...]) -> None:
    """RecipeError unless the inner quantizer may be within one of this kind."""
    if inner.kind in refused:
        raise RecipeError(f"{inner.kind} cannot be within {kind}")


def borrowed_by(quantizer: Quantizer) -> Layout:
    """Tensors that `restore` needs beside those of its layout, since another layer stores them."""
    found: Layout = getattr(quantizer, "borrows", {})
    return found


def _prefixed(layout: Layout) -> Layout:
    return {INNER + name: item for name, item in layout.items()}
