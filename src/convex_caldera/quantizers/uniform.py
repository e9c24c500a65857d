"""Uniform scalar quantization with a scale per group, as in GPTQ, AWQ and integer kernels.

    value = (code - zero_point) * scale,    code = 0 .. 2^b - 1.

Affine grids store an integer zero point of b bits beside each scale; symmetric ones have the
levels -2^(b-1) .. 2^(b-1) - 1 (one bit: +-scale / 2). `legacy_levels` drops the lowest level,
as absmax quantization usually does. Scales come from each group's extremes or from a search
for least weighted squared error (`range_search`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from convex_caldera.coding.bitpack import pack_bits, packed_bytes, unpack_bits
from convex_caldera.errors import FormatError, RecipeError
from convex_caldera.quantizers.grouped import GroupScaled, restored_scales
from convex_caldera.quantizers.groups import (
    SCALE_DTYPES,
    Groups,
    check_columns,
    check_finite,
    check_group_options,
    check_matrix,
    checked_tensor,
    round_scales,
)
from convex_caldera.quantizers.range_search import (
    Grid,
    covering_affine,
    covering_symmetric,
    search_scales,
)

MAX_BITS = 8
_CHUNK = 1 << 20  # weights per chunk of the search: its temporaries stay in cache


@dataclass(frozen=True)
class Uniform:
    """Evenly spaced levels, 1 to 8 bits.

    Args:
        bits: per weight.
        group_size: weights of a row that share a scale; 0 the whole row, -1 the whole matrix.
        symmetric: no zero points.
        search: choose scales by weighted squared error; False covers each group's extremes.
        scale_dtype: how scales are stored, "float16", "bfloat16" or "float32".
        legacy_levels: symmetric only; 2^b - 1 levels, -2^(b-1) not used.

    Raises:
        RecipeError: an option out of range, or two that contradict each other.
    """

    bits: int
    group_size: int = 128
    symmetric: bool = False
    search: bool = True
    scale_dtype: str = "float16"
    legacy_levels: bool = False

    kind: ClassVar[str] = "uniform"

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= MAX_BITS:
            raise RecipeError(f"uniform codes have 1 to {MAX_BITS} bits, got {self.bits}")
        if self.legacy_levels and (not self.symmetric or self.bits < 2):
            raise RecipeError("legacy_levels is for symmetric grids of at least 2 bits")
        check_group_options(self.group_size, self.scale_dtype)

    @property
    def block(self) -> int:
        return 1

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - (2 if self.legacy_levels else 1)

    @property
    def middle(self) -> float:
        """Zero point of symmetric grids; 1/2 for one bit, whose levels are +-1/2."""
        return 0.5 if self.bits == 1 else float((self.top + 1) // 2)

    def fit(
        self, W: Tensor, *, importance: Tensor | None = None, gain: float = 1.0
    ) -> FittedUniform:
        """Scales and zero points for W (m, n), scales rounded to `scale_dtype`.

        Raises:
            ShapeError, NumericalError: W is not a finite matrix, or its scales do not fit
                `scale_dtype` (see `groups.round_scales`).
        """
        check_matrix(W, importance, gain)
        shape = (W.shape[0], W.shape[1])
        groups = Groups(shape, self.group_size)
        weights = torch.ones_like(W[0]) if importance is None else importance.to(W.device)
        per_tensor = groups.grid == (1, 1) and shape[0] > 1
        step = shape[0] if per_tensor else max(1, _CHUNK // shape[1])
        grids = [self._fit_chunk(rows.float(), weights.float()) for rows in W.split(step)]
        scale = torch.cat([grid.scale.squeeze(-1) for grid in grids])
        zero_points = torch.cat([grid.zero_point.squeeze(-1) for grid in grids]).to(torch.uint8)
        return FittedUniform(
            self,
            shape,
            round_scales(scale * gain, self.scale_dtype),
            None if self.symmetric else zero_points,
        )

    def layout(self, shape: tuple[int, int]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Scales, zero points of affine grids packed in `bits` bits, and packed codes."""
        grid = Groups(shape, self.group_size).grid
        layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "scales": (SCALE_DTYPES[self.scale_dtype], grid),
            "codes": (torch.uint8, (packed_bytes(shape[0] * shape[1], self.bits),)),
        }
        if not self.symmetric:
            layout["zero_points"] = (torch.uint8, (packed_bytes(grid[0] * grid[1], self.bits),))
        return layout

    def restore(self, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> FittedUniform:
        """From `FittedUniform.tensors()`; FormatError if shapes, types or lengths differ."""
        grid = Groups(shape, self.group_size).grid
        scales = restored_scales(self, shape, tensors)
        if self.symmetric:
            return FittedUniform(self, shape, scales, None)
        count = grid[0] * grid[1]
        length = packed_bytes(count, self.bits)
        packed = checked_tensor(tensors, "zero_points", (length,), torch.uint8)
        zero_points = unpack_bits(packed, self.bits, count).view(grid)
        return FittedUniform(self, shape, scales, zero_points)

    def _fit_chunk(self, W: Tensor, weights: Tensor) -> Grid:
        groups = Groups((W.shape[0], W.shape[1]), self.group_size)
        x = groups.split(W)
        starts = self._covering(x)
        if not self.search:
            return starts[0]
        round_scales(starts[0].scale, self.scale_dtype)
        spread = groups.split(weights.expand_as(W)) if groups.grid == (1, 1) else None
        members = groups.split(weights[None]) if spread is None else spread
        dtype = SCALE_DTYPES[self.scale_dtype]
        return search_scales(x, members, starts, self.bits, dtype, not self.symmetric)

    def _covering(self, x: Tensor) -> list[Grid]:
        if not self.symmetric:
            return [covering_affine(x, self.bits)]
        start = covering_symmetric(x, self.middle, self.top)
        if 2 * self.middle == self.top:
            return [start]
        # a negative scale puts the level without a partner on the other side
        mirrored = covering_symmetric(-x, self.middle, self.top)
        return [start, Grid(-mirrored.scale, mirrored.zero_point, mirrored.top)]


@dataclass(frozen=True, eq=False)
class FittedUniform(GroupScaled):
    """Uniform with its scales (and zero points), one per group. Codes are (m, n) uint8.

    Affine zero points lie in 0 .. 2^b - 1, so zero is always a level. A group whose scale is 0
    (all its weights are) decodes to zeros.
    """

    quantizer: Uniform
    shape: tuple[int, int]
    scales: Tensor
    zero_points: Tensor | None

    def encode(self, x: Tensor, start: int = 0) -> Tensor:
        """Nearest codes (m, d) of columns start .. start + d."""
        check_columns(x, self.shape, start, 1)
        check_finite(x, "the matrix to encode")
        return self._grid(start, x.shape[1], x.device).codes(x.float()).to(torch.uint8)

    def decode(self, codes: Tensor, start: int = 0) -> Tensor:
        """Values (m, d), float32: (code - zero_point) * scale."""
        grid = self._grid(start, codes.shape[1], codes.device)
        return (codes.float() - grid.zero_point) * grid.scale

    def take_rows(self, rows: slice) -> FittedUniform:
        taken = super().take_rows(rows)
        if self.zero_points is None:
            return taken
        groups = Groups(self.shape, self.quantizer.group_size)
        return dataclasses.replace(taken, zero_points=groups.take_rows(self.zero_points, rows))

    def unpack(self, packed: Tensor) -> Tensor:
        codes = super().unpack(packed)
        if int(codes.max()) > self.quantizer.top:
            raise FormatError(f"codes lie in 0 .. {self.quantizer.top}, got {int(codes.max())}")
        return codes

    def tensors(self) -> dict[str, Tensor]:
        """`scales` as stored; `zero_points` packed in `bits` bits each, if affine."""
        if self.zero_points is None:
            return super().tensors()
        return super().tensors() | {"zero_points": pack_bits(self.zero_points, self.code_bits)}

    def _grid(self, start: int, size: int, device: torch.device) -> Grid:
        scale = self._scale(start, size, device)
        if self.zero_points is None:
            return Grid(scale, torch.full_like(scale, self.quantizer.middle), self.quantizer.top)
        groups = Groups(self.shape, self.quantizer.group_size)
        zero_point = groups.spread(self.zero_points.to(device), start, size).float()
        return Grid(scale, zero_point, self.quantizer.top)
