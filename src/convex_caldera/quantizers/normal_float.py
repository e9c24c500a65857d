"""NormalFloat: levels at quantiles of the normal distribution (Dettmers et al., QLoRA, 2305.14314).

With delta = (1/30 + 1/32) / 2 and M = 2^(b-1), the levels are inv_cdf(p) / inv_cdf(1 - delta)
for M probabilities evenly spaced on [delta, 1/2] and M + 1 on [1/2, 1 - delta]; both contain
p = 1/2, so 2^b levels from -1 to 1 remain, zero among them. delta is NF4's for every b, as in
the CALDERA code, so that wider tables refine the same range. Each group is scaled by its
largest absolute value. Rounding is to the nearest level.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist
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

TAIL_PROBABILITY = (1 / 30 + 1 / 32) / 2


@cache
def levels(bits: int) -> Tensor:
    """(2^bits,) float32, ascending from -1 to 1."""
    half = 1 << (bits - 1)
    width = 0.5 - TAIL_PROBABILITY
    below = [TAIL_PROBABILITY + width * k / (half - 1) for k in range(half - 1)]
    above = [0.5 + width * k / half for k in range(1, half + 1)]
    quantile = NormalDist().inv_cdf
    largest = quantile(1 - TAIL_PROBABILITY)
    return torch.tensor([quantile(p) / largest for p in (*below, 0.5, *above)])


@dataclass(frozen=True)
class NormalFloat:
    """NF2 .. NF8 with one absmax scale per group.

    Args:
        bits: 2 to 8.
        group_size: weights of a row that share a scale; 0 the whole row, -1 the whole matrix.
        scale_dtype: how scales are stored, "float16", "bfloat16" or "float32".

    Raises:
        RecipeError: an option out of range.
    """

    bits: int
    group_size: int = 64
    scale_dtype: str = "float16"

    kind: ClassVar[str] = "normal_float"

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise RecipeError(f"NormalFloat has 2 to 8 bits, got {self.bits}")
        check_group_options(self.group_size, self.scale_dtype)

    @property
    def block(self) -> int:
        return 1

    def fit(
        self, W: Tensor, *, importance: Tensor | None = None, gain: float = 1.0
    ) -> FittedNormalFloat:
        """gain * max |W| of each group, rounded to `scale_dtype`; importance changes nothing.

        Raises:
            ShapeError, NumericalError: W is not a finite matrix, or its scales do not fit
                `scale_dtype` (see `groups.round_scales`).
        """
        check_matrix(W, importance, gain)
        shape = (W.shape[0], W.shape[1])
        largest = Groups(shape, self.group_size).split(W.float()).abs().amax(-1)
        return FittedNormalFloat(self, shape, round_scales(largest * gain, self.scale_dtype))

    def layout(self, shape: tuple[int, int]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """A scale per group, and `bits` bits per weight."""
        grid = Groups(shape, self.group_size).grid
        length = packed_bytes(shape[0] * shape[1], self.bits)
        return {
            "scales": (SCALE_DTYPES[self.scale_dtype], grid),
            "codes": (torch.uint8, (length,)),
        }

    def restore(self, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> FittedNormalFloat:
        """From `FittedNormalFloat.tensors()`; FormatError if shape or type differ."""
        return FittedNormalFloat(self, shape, restored_scales(self, shape, tensors))


@dataclass(frozen=True, eq=False)
class FittedNormalFloat(GroupScaled):
    """NormalFloat with its scales, one per group. Codes are (m, n) uint8, levels ascending.

    A group whose scale is 0 (all its weights are) decodes to zeros.
    """

    quantizer: NormalFloat
    shape: tuple[int, int]
    scales: Tensor

    def encode(self, x: Tensor, start: int = 0) -> Tensor:
        """Nearest codes (m, d) of columns start .. start + d."""
        check_columns(x, self.shape, start, 1)
        check_finite(x, "the matrix to encode")
        scale = self._scale(start, x.shape[1], x.device)
        table = levels(self.quantizer.bits).to(x.device)
        between = (table[1:] + table[:-1]) / 2
        divisor = torch.where(scale == 0, torch.inf, scale)
        return torch.bucketize(x.float() / divisor, between).to(torch.uint8)

    def decode(self, codes: Tensor, start: int = 0) -> Tensor:
        """Values (m, d), float32: level * scale."""
        table = levels(self.quantizer.bits).to(codes.device)
        return table[codes.long()] * self._scale(start, codes.shape[1], codes.device)
