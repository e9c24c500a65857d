"""Minifloats: a sign, a few exponent bits, a few mantissa bits, and one scale per group.

With e exponent and k = bits - 1 - e mantissa bits, bias 2^(e-1) - 1, the magnitudes are

    exponent field X = 0   (M / 2^k) 2^(1 - bias)          subnormals and zero
    X > 0                  (1 + M / 2^k) 2^(X - bias)

All patterns are numbers: there is neither infinity nor NaN, and what is too large saturates, as
in the software emulation of LQER (arXiv 2402.02446) and in OCP's FP4 and FP6. E2M1 is FP4, E4M3
FP8. The scale of a group puts its largest weight on the largest magnitude.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from convex_caldera.coding.bitpack import packed_bytes
from convex_caldera.errors import RecipeError
from convex_caldera.quantizers.grouped import GroupScaled, restored_scales
from convex_caldera.quantizers.groups import (
    SCALE_DTYPES,
    Groups,
    check_columns,
    check_finite,
    check_group_options,
    check_matrix,
    round_scales,
)

MAX_EXPONENT_BITS = 5


@cache
def magnitudes(bits: int, exponent_bits: int) -> Tensor:
    """(2^(bits - 1),) float32, ascending: the number of each pattern without sign."""
    k = bits - 1 - exponent_bits
    bias = (1 << (exponent_bits - 1)) - 1
    values = []
    for pattern in range(1 << (bits - 1)):
        field, mantissa = pattern >> k, pattern & ((1 << k) - 1)
        whole = (1.0 if field else 0.0) + mantissa / (1 << k)
        values.append(whole * 2.0 ** (max(field, 1) - bias))
    return torch.tensor(values)


@dataclass(frozen=True)
class Minifloat:
    """E`e`M`k` with one scale per group; `bits` is 1 + e + k.

    Args:
        bits: 3 to 8, sign included.
        exponent_bits: e, 1 to 5 and below `bits`.
        group_size: weights of a row that share a scale; 0 the whole row, -1 the whole matrix.
        scale_dtype: how scales are stored, "float16", "bfloat16" or "float32".

    Raises:
        RecipeError: an option out of range.
    """

    bits: int = 4
    exponent_bits: int = 2
    group_size: int = 32
    scale_dtype: str = "float16"

    kind: ClassVar[str] = "minifloat"

    def __post_init__(self) -> None:
        if not 3 <= self.bits <= 8:
            raise RecipeError(f"minifloats have 3 to 8 bits, sign included, got {self.bits}")
        if not 1 <= self.exponent_bits <= min(MAX_EXPONENT_BITS, self.bits - 1):
            raise RecipeError(
                f"exponent_bits is 1 to {min(MAX_EXPONENT_BITS, self.bits - 1)} for {self.bits} "
                f"bits, got {self.exponent_bits}"
            )
        check_group_options(self.group_size, self.scale_dtype)

    @property
    def block(self) -> int:
        return 1

    @property
    def magnitudes(self) -> Tensor:
        return magnitudes(self.bits, self.exponent_bits)

    @property
    def levels(self) -> Tensor:
        """(2^bits,) float32: the number of every code; the sign is the highest bit."""
        return torch.cat([self.magnitudes, -self.magnitudes])

    def fit(
        self, W: Tensor, *, importance: Tensor | None = None, gain: float = 1.0
    ) -> FittedMinifloat:
        """gain * max |W| / (largest magnitude) of each group; importance changes nothing.

        Raises:
            ShapeError, NumericalError: W is not a finite matrix, or its scales do not fit
                `scale_dtype` (see `groups.round_scales`).
        """
        check_matrix(W, importance, gain)
        shape = (W.shape[0], W.shape[1])
        largest = Groups(shape, self.group_size).split(W.float()).abs().amax(-1)
        scales = largest * gain / self.magnitudes[-1].item()
        return FittedMinifloat(self, shape, round_scales(scales, self.scale_dtype))

    def layout(self, shape: tuple[int, int]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """A scale per group, and `bits` bits per weight."""
        length = packed_bytes(shape[0] * shape[1], self.bits)
        return {
            "codes": (torch.uint8, (length,)),
            "scales": (SCALE_DTYPES[self.scale_dtype], Groups(shape, self.group_size).grid),
        }

    def restore(self, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> FittedMinifloat:
        """From `FittedMinifloat.tensors()`; FormatError if shape or type differ."""
        return FittedMinifloat(self, shape, restored_scales(self, shape, tensors))


@dataclass(frozen=True, eq=False)
class FittedMinifloat(GroupScaled):
    """Minifloat with its scales, one per group. Codes are (m, n) uint8, the bit patterns.

    A group whose scale is 0 (all its weights are) decodes to zeros. Minus zero is read, as zero,
    and never written.
    """

    quantizer: Minifloat
    shape: tuple[int, int]
    scales: Tensor

    def encode(self, x: Tensor, start: int = 0) -> Tensor:
        """Nearest codes (m, d) of columns start .. start + d; a tie goes to the smaller."""
        check_columns(x, self.shape, start, 1)
        check_finite(x, "the matrix to encode")
        table = self.quantizer.magnitudes.to(x.device)
        scale = self._scale(start, x.shape[1], x.device)
        relative = x.float() / torch.where(scale == 0, torch.inf, scale)
        pattern = torch.bucketize(relative.abs(), (table[1:] + table[:-1]) / 2)
        sign = (relative < 0) & (pattern > 0)
        return (pattern + sign * len(table)).to(torch.uint8)

    def decode(self, codes: Tensor, start: int = 0) -> Tensor:
        """Values (m, d), float32: level * scale."""
        levels = self.quantizer.levels.to(codes.device)
        return levels[codes.long()] * self._scale(start, codes.shape[1], codes.device)
