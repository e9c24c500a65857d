"""What a compressed weight is made of: a closed set of terms, and the layer that sums them.

    W^ = T^-1( sum of terms ),   term = Coded(codes, fitted, coder) | LowRank(left, right)

and a factor of a low-rank term is dense (16 bits) or itself coded.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, reduce

import torch
from torch import Tensor

from convex_caldera.core.protocols import Coder, FittedQuantizer, FittedTransform, RateLimited

# What naming a coder costs in a file header at most: entropy coding must save more than that.
CODER_HEADER_BYTES = 128


@dataclass(frozen=True, eq=False)
class Coded:
    """Integer codes and the fitted quantizer that turns them into an (m, n) matrix.

    With a `coder` codes are stored entropy-coded, if that is shorter by more than what naming the
    coder costs, or if the quantizer's rate is meant so.
    """

    codes: Tensor
    fitted: FittedQuantizer
    coder: Coder | None = None

    def decode(self) -> Tensor:
        return self.fitted.decode(self.codes)

    def stored_bytes(self) -> int:
        side = sum(t.numel() * t.element_size() for t in self.fitted.tensors().values())
        return self.stored_codes[0].numel() + side

    @cached_property
    def packed(self) -> Tensor:
        """Codes at their fixed width, flat uint8."""
        return self.fitted.pack(self.codes)

    @cached_property
    def stored_codes(self) -> tuple[Tensor, Coder | None]:
        """Codes as stored, flat uint8, and the coder that reads them, None at fixed width."""
        if self.coder is None:
            return self.packed, None
        coded = self.coder.encode(self.packed)
        meant = isinstance(self.fitted.quantizer, RateLimited)
        if meant or coded.numel() + CODER_HEADER_BYTES < self.packed.numel():
            return coded, self.coder
        return self.packed, None


@dataclass(frozen=True, eq=False)
class Dense:
    """A factor kept in float16 or bfloat16, exactly as stored."""

    values: Tensor

    def decode(self) -> Tensor:
        return self.values.float()

    def stored_bytes(self) -> int:
        return self.values.numel() * self.values.element_size()


Factor = Dense | Coded


@dataclass(frozen=True, eq=False)
class LowRank:
    """left (m, rank) @ right (rank, n). A coded left is stored as its transpose (rank, m),

    so that the quantizer's blocks run along the long side of both factors.
    """

    left: Factor
    right: Factor

    @property
    def rank(self) -> int:
        return self.right_matrix().shape[0]

    def left_matrix(self) -> Tensor:
        return self.left.decode().T if isinstance(self.left, Coded) else self.left.decode()

    def right_matrix(self) -> Tensor:
        return self.right.decode()

    def decode(self) -> Tensor:
        return self.left_matrix() @ self.right_matrix()

    def stored_bytes(self) -> int:
        return self.left.stored_bytes() + self.right.stored_bytes()


Term = Coded | LowRank


@dataclass(frozen=True, eq=False)
class CompressedLayer:
    """The one stored thing: terms inside transforms (outermost first), shape (m, n).

    The bias, if any, is not ours: it stays with the uncompressed tensors.
    """

    shape: tuple[int, int]
    terms: tuple[Term, ...]
    transforms: tuple[FittedTransform, ...] = ()

    def decode(self) -> Tensor:
        """W^ (m, n), float32, in the coordinates of the original weight."""
        inner = sum_terms(self.terms, self.shape)
        return reduce(lambda W, t: t.invert(W), reversed(self.transforms), inner)

    def stored_bytes(self) -> int:
        """Bytes of all tensors of this layer, before file headers."""
        sides = [t for transform in self.transforms for t in transform.tensors().values()]
        total = sum(term.stored_bytes() for term in self.terms)
        return total + sum(t.numel() * t.element_size() for t in sides)

    @property
    def rank(self) -> int:
        return sum(term.rank for term in self.terms if isinstance(term, LowRank))


def sum_terms(terms: tuple[Term, ...] | list[Term], shape: tuple[int, int]) -> Tensor:
    """The sum of the decoded terms; zeros if there are none."""
    if not terms:
        return torch.zeros(shape)
    return reduce(torch.add, (term.decode() for term in terms))
