"""Scales that are quantized themselves, around any other quantizer.

    W = s_g V,   V coded by `inner`,   s_g = offset + code_g * step_h

s_g is the largest |W| of a group of weights; the scales of a matrix, row-major, are cut into super
groups h of `super_group` scales with one step each, and the least scale of the matrix is the
offset. With 64 weights a group, 8 bits a scale and 256 scales a super group that is 0.127 bits a
weight instead of 0.25 for float16 scales.

Source: double quantization of Dettmers et al., QLoRA, arXiv 2305.14314, in the form that LQ-LoRA
(arXiv 2311.12023) and ReALLM (arXiv 2405.13155) give it. Differs: groups are runs of one row, so
they do not run over row ends; a scale above the offset never rounds down to it, so that no group
is lost beside an outlier.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from convex_caldera.coding.bitpack import pack_bits, packed_bytes, unpack_bits
from convex_caldera.core.protocols import FittedQuantizer, Quantizer
from convex_caldera.errors import FormatError, NumericalError, RecipeError
from convex_caldera.quantizers.codebooks import BlockCodes
from convex_caldera.quantizers.groups import (
    PER_TENSOR,
    Groups,
    check_columns,
    check_finite,
    check_matrix,
    checked_tensor,
    sliced_shape,
)
from convex_caldera.quantizers.nested import FittedNesting, Layout, Nesting, check_inner

# Kinds that hold others, which double_scale therefore does not hold.
NESTING = ("double_scale", "strip_order")
# Where a step of a denormal would make scale codes meaningless.
LEAST_SCALE = 1e-30


@dataclass(frozen=True)
class DoubleScale(Nesting):
    """Group scales on `scale_bits` bits around another quantizer of the normalized weights.

    Args:
        inner: codes the weights divided by their group's scale, all within about [-1, 1].
        group_size: weights of a row that share a scale; 0 the whole row.
        scale_bits: 2 to 8 per scale.
        super_group: scales that share a step.

    Raises:
        RecipeError: an option out of range, or a scaling of a scaling.
    """

    inner: Quantizer
    group_size: int = 64
    scale_bits: int = 8
    super_group: int = 256

    kind: ClassVar[str] = "double_scale"

    def __post_init__(self) -> None:
        if self.group_size < 0 or self.super_group < 1:
            raise RecipeError(
                f"group_size must be >= 0 and super_group positive, got {self.group_size} "
                f"and {self.super_group}"
            )
        if not 2 <= self.scale_bits <= 8:
            raise RecipeError(f"scales have 2 to 8 bits, got {self.scale_bits}")
        check_inner(self.inner, self.kind, NESTING)

    @property
    def block(self) -> int:
        return self.inner.block

    def fit(
        self, W: Tensor, *, importance: Tensor | None = None, gain: float = 1.0
    ) -> FittedDoubleScale:
        """Scales of W (m, n), and the inner quantizer fitted to W over them.

        Raises:
            ShapeError, NumericalError: W is no finite matrix, or its scales are too small.
        """
        check_matrix(W, importance, gain)
        shape = (W.shape[0], W.shape[1])
        largest = Groups(shape, self.group_size).split(W.float()).abs().amax(-1)
        codes, steps, offset = self._quantized(largest)
        grid = self._grid(shape, codes, steps, offset)
        values = _divided(W.float(), Groups(shape, self.group_size).spread(grid, 0, shape[1]))
        inner = self.inner.fit(values, importance=importance)
        steps, offset = steps * gain, offset * gain
        grid = self._grid(shape, codes, steps, offset)
        # What was fitted may be of another record: a decoder trained beforehand has none.
        own = replace(self, inner=inner.quantizer)
        return _fitted(own, shape, codes, steps, offset, grid, inner)

    def divided(self, W: Tensor) -> Tensor:
        """What the inner quantizer sees of W: every weight over its group's scale, as stored."""
        shape = (W.shape[0], W.shape[1])
        groups = Groups(shape, self.group_size)
        grid = self._grid(shape, *self._quantized(groups.split(W.float()).abs().amax(-1)))
        return _divided(W.float(), groups.spread(grid, 0, shape[1]))

    def layout(self, shape: tuple[int, int]) -> Layout:
        """Scale codes, a step per super group, the offset, and what the inner one stores."""
        scales = _count(shape, self.group_size)
        own: Layout = {
            "scale_codes": (torch.uint8, (packed_bytes(scales, self.scale_bits),)),
            "steps": (torch.float32, (-(-scales // self.super_group),)),
            "offset": (torch.float32, (1,)),
        }
        return self.layout_around(shape, own)

    def restore(self, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> FittedDoubleScale:
        """From `FittedDoubleScale.tensors()`; FormatError if something does not fit."""
        layout = self.layout(shape)
        scales = _count(shape, self.group_size)
        own = {
            name: checked_tensor(tensors, name, layout[name][1], layout[name][0])
            for name in ("scale_codes", "steps", "offset")
        }
        if (own["steps"] < 0).any() or (own["offset"] < 0).any():
            raise FormatError("steps and offset of scales are not negative: altered file")
        codes = unpack_bits(own["scale_codes"], self.scale_bits, scales)
        grid = self._grid(shape, codes, own["steps"], own["offset"])
        inner = self.restored_inner(shape, tensors)
        return _fitted(self, shape, codes, own["steps"], own["offset"], grid, inner)

    def _quantized(self, scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, steps and offset of the scales (m, groups)."""
        flat, top = scales.reshape(-1), (1 << self.scale_bits) - 1
        if 0 < float(flat.max()) < LEAST_SCALE:
            raise NumericalError(
                f"largest scale {float(flat.max()):.3e} is below {LEAST_SCALE:.0e};"
                " multiply the weight by a constant"
            )
        offset = flat.min().reshape(1)
        above = torch.nn.functional.pad(flat - offset, (0, -flat.numel() % self.super_group))
        steps = above.view(-1, self.super_group).amax(1) / top
        divisor = torch.where(steps == 0, torch.inf, steps).repeat_interleave(self.super_group)
        codes = (above / divisor)[: flat.numel()].round().clamp(max=top)
        codes = torch.where(flat > offset, codes.clamp(min=1), codes)
        return codes.to(torch.uint8), steps, offset

    def _grid(self, shape: tuple[int, int], codes: Tensor, steps: Tensor, offset: Tensor) -> Tensor:
        """Scales as decoded, (m, groups) float32: offset + code * step."""
        spread = steps.repeat_interleave(self.super_group)[: codes.numel()]
        return (offset + codes.float() * spread).view(Groups(shape, self.group_size).grid)


@dataclass(frozen=True, eq=False)
class FittedDoubleScale(FittedNesting):
    """DoubleScale with its scales; codes are those of the inner quantizer.

    `grid` holds the decoded scales, (m, groups) float32. Of a slice of rows, `tensors()` still
    are those of the whole matrix.
    """

    quantizer: DoubleScale
    shape: tuple[int, int]
    scale_codes: Tensor
    steps: Tensor
    offset: Tensor
    grid: Tensor
    inner: FittedQuantizer

    @property
    def position_free(self) -> bool:
        return self.grid.numel() == 1 and self.inner.position_free

    def encode(self, x: Tensor, start: int = 0) -> Tensor:
        """Inner codes of x over its scales."""
        check_columns(x, self.shape, start, self.quantizer.block)
        check_finite(x, "the matrix to encode")
        return self.inner.encode(_divided(x.float(), self._scales(x, start)), start)

    def decode(self, codes: Tensor, start: int = 0) -> Tensor:
        """Inner values times their scales, float32."""
        values = self.inner.decode(codes, start)
        return values * self._scales(values, start)

    def take_rows(self, rows: slice) -> FittedDoubleScale:
        shape = sliced_shape(self.shape, rows)
        return replace(self, shape=shape, grid=self.grid[rows], inner=self.inner.take_rows(rows))

    def tensors(self) -> dict[str, Tensor]:
        """`scale_codes` packed, `steps`, `offset`, and the inner tensors under "inner_"."""
        return {
            "scale_codes": pack_bits(self.scale_codes, self.quantizer.scale_bits),
            "steps": self.steps,
            "offset": self.offset,
            **self.inner_tensors(),
        }

    def _scales(self, x: Tensor, start: int) -> Tensor:
        groups = Groups(self.shape, self.quantizer.group_size)
        return groups.spread(self.grid.to(x.device), start, x.shape[1])


@dataclass(frozen=True, eq=False)
class FittedScaledBlocks(FittedDoubleScale):
    """DoubleScale around a codebook of blocks, which rounds panels with feedback in one call."""

    def round_panel(
        self, target: Tensor, base: Tensor, coupling: Tensor, start: int
    ) -> tuple[Tensor, Tensor]:
        """Codes and values of a run of columns (`core.protocols.RoundsPanels`)."""
        assert isinstance(self.inner, BlockCodes)
        outer = self._scales(target, start).expand(target.shape)
        return self.inner.round_panel(target, base, coupling, start, outer)


def _fitted(
    quantizer: DoubleScale,
    shape: tuple[int, int],
    codes: Tensor,
    steps: Tensor,
    offset: Tensor,
    grid: Tensor,
    inner: FittedQuantizer,
) -> FittedDoubleScale:
    kind = FittedScaledBlocks if isinstance(inner, BlockCodes) else FittedDoubleScale
    return kind(quantizer, shape, codes, steps, offset, grid, inner)


def _count(shape: tuple[int, int], group_size: int) -> int:
    assert group_size != PER_TENSOR  # refused by DoubleScale
    rows, groups = Groups(shape, group_size).grid
    return rows * groups


def _divided(x: Tensor, scale: Tensor) -> Tensor:
    """x / scale, zero where the scale is."""
    return x / torch.where(scale == 0, torch.inf, scale)
