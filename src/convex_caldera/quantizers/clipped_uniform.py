"""Evenly spaced levels between the extremes of a group, or between two of its quantiles.

    value = low + code * step,    step = (high - low) / (2^b - 1)

low and high are the least and the largest weight of the group or, with clip_ratio c < 1, its
(1 - c) / 2 and (1 + c) / 2 quantiles, beyond which weights are clipped. The textbook quantizer,
per tensor as course projects use it or per channel or group; unlike `Uniform` it needs no level
at zero, so that a constant matrix is kept as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from convex_caldera.coding.bitpack import packed_bytes
from convex_caldera.errors import RecipeError
from convex_caldera.quantizers.grouped import ScalarCodes
from convex_caldera.quantizers.groups import (
    PER_TENSOR,
    SCALE_DTYPES,
    Groups,
    check_codes,
    check_columns,
    check_finite,
    check_group_options,
    check_matrix,
    checked_tensor,
    round_scales,
    sliced_shape,
)


@dataclass(frozen=True)
class ClippedUniform:
    """Evenly spaced levels over a range, 1 to 8 bits.

    Args:
        bits: per weight.
        group_size: weights of a row that share a range; 0 the whole row, -1 the whole matrix.
        clip_ratio: part of the weights that the range covers, above 0 and at most 1.
        scale_dtype: how `lows` and `steps` are stored, "float16", "bfloat16" or "float32".

    Raises:
        RecipeError: an option out of range.
    """

    bits: int = 8
    group_size: int = -1
    clip_ratio: float = 1.0
    scale_dtype: str = "float32"

    kind: ClassVar[str] = "clipped_uniform"

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise RecipeError(f"uniform codes have 1 to 8 bits, got {self.bits}")
        if not 0 < self.clip_ratio <= 1:
            raise RecipeError(
                f"clip_ratio is the part of the weights inside the range, above 0 and at most 1, "
                f"got {self.clip_ratio}"
            )
        check_group_options(self.group_size, self.scale_dtype)

    @property
    def block(self) -> int:
        return 1

    def fit(
        self, W: Tensor, *, importance: Tensor | None = None, gain: float = 1.0
    ) -> FittedClippedUniform:
        """gain * range of each group; importance changes nothing.

        Raises:
            ShapeError, NumericalError: W is not a finite matrix, or its range does not fit
                `scale_dtype` (see `groups.round_scales`).
        """
        check_matrix(W, importance, gain)
        shape = (W.shape[0], W.shape[1])
        low, high = self._ranges(W)
        lows = round_scales(low.double() * gain, self.scale_dtype)
        step = (high.double() - low.double()) * gain / ((1 << self.bits) - 1)
        return FittedClippedUniform(self, shape, lows, round_scales(step, self.scale_dtype))

    def layout(self, shape: tuple[int, int]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """A low and a step per group, and `bits` bits per weight."""
        grid, dtype = Groups(shape, self.group_size).grid, SCALE_DTYPES[self.scale_dtype]
        return {
            "lows": (dtype, grid),
            "steps": (dtype, grid),
            "codes": (torch.uint8, (packed_bytes(shape[0] * shape[1], self.bits),)),
        }

    def restore(
        self, shape: tuple[int, int], tensors: Mapping[str, Tensor]
    ) -> FittedClippedUniform:
        """From `FittedClippedUniform.tensors()`; FormatError if shape or type differ."""
        grid, dtype = Groups(shape, self.group_size).grid, SCALE_DTYPES[self.scale_dtype]
        lows = checked_tensor(tensors, "lows", grid, dtype)
        return FittedClippedUniform(
            self, shape, lows, checked_tensor(tensors, "steps", grid, dtype)
        )

    def _ranges(self, W: Tensor) -> tuple[Tensor, Tensor]:
        """Both ends of every group's range, in the shape of `Groups.grid`."""
        if self.group_size == PER_TENSOR:
            low, high = self._ends(W.reshape(1, -1))
            return low, high
        width = Groups((W.shape[0], W.shape[1]), self.group_size).width
        ends = [self._ends(part) for part in W.split(width, dim=1)]
        return torch.cat([e[0] for e in ends], 1), torch.cat([e[1] for e in ends], 1)

    def _ends(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(rows, 1) least and largest, or two order statistics, of each row."""
        outside = int((1 - self.clip_ratio) / 2 * x.shape[1])
        if outside == 0:
            return x.amin(1, keepdim=True).float(), x.amax(1, keepdim=True).float()
        low = x.float().kthvalue(outside + 1, dim=1, keepdim=True).values
        high = x.float().kthvalue(x.shape[1] - outside, dim=1, keepdim=True).values
        return low, high


@dataclass(frozen=True, eq=False)
class FittedClippedUniform(ScalarCodes):
    """ClippedUniform with its ranges. Codes are (m, n) uint8."""

    quantizer: ClippedUniform
    shape: tuple[int, int]
    lows: Tensor
    steps: Tensor

    @property
    def position_free(self) -> bool:
        return self.steps.numel() == 1

    def encode(self, x: Tensor, start: int = 0) -> Tensor:
        """Nearest codes (m, d) of columns start .. start + d."""
        check_columns(x, self.shape, start, 1)
        check_finite(x, "the matrix to encode")
        low, step = self._spread(start, x.shape[1], x.device)
        divisor = torch.where(step == 0, torch.inf, step)
        codes = ((x.float() - low) / divisor).round_().clamp_(0, (1 << self.quantizer.bits) - 1)
        return codes.to(torch.uint8)

    def decode(self, codes: Tensor, start: int = 0) -> Tensor:
        """Values (m, d), float32: low + float32(code * step)."""
        check_codes(codes, 1 << self.quantizer.bits)
        low, step = self._spread(start, codes.shape[1], codes.device)
        return low + codes.float() * step

    def take_rows(self, rows: slice) -> FittedClippedUniform:
        groups = Groups(self.shape, self.quantizer.group_size)
        lows, steps = groups.take_rows(self.lows, rows), groups.take_rows(self.steps, rows)
        return FittedClippedUniform(self.quantizer, sliced_shape(self.shape, rows), lows, steps)

    def tensors(self) -> dict[str, Tensor]:
        return {"lows": self.lows, "steps": self.steps}

    def _spread(self, start: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
        groups = Groups(self.shape, self.quantizer.group_size)
        low = groups.spread(self.lows.to(device), start, size).float()
        return low, groups.spread(self.steps.to(device), start, size).float()
