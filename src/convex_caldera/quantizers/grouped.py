"""What fitted quantizers share: codes of weights, and one scale per group."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from convex_caldera.coding.bitpack import pack_bits, unpack_bits
from convex_caldera.quantizers.groups import (
    SCALE_DTYPES,
    Groups,
    checked_tensor,
    round_scales,
    sliced_shape,
)


class ScalarCodes:
    """Codes (m, n) of `code_bits` bits each, rows coded by themselves."""

    quantizer: Any
    shape: tuple[int, int]

    @property
    def row_block(self) -> int:
        return 1

    @property
    def code_bits(self) -> int:
        """Width of a code before any entropy coding."""
        width: int = self.quantizer.bits
        return width

    @property
    def blocks(self) -> int:
        """Codes of a row."""
        return self.shape[1]

    def pack(self, codes: Tensor) -> Tensor:
        """`code_bits` bits per code, row-major (`coding.bitpack`)."""
        return pack_bits(codes, self.code_bits)

    def unpack(self, packed: Tensor) -> Tensor:
        m, blocks = self.shape[0], self.blocks
        return unpack_bits(packed, self.code_bits, m * blocks).view(m, blocks)


class GroupScaled(ScalarCodes):
    """Scalar codes under `scales`, one per group of `Groups(shape, quantizer.group_size)`.

    For frozen dataclasses whose fields include these three.
    """

    scales: Tensor

    @property
    def position_free(self) -> bool:
        return self.scales.numel() == 1

    def take_rows(self, rows: slice) -> Self:
        scales = Groups(self.shape, self.quantizer.group_size).take_rows(self.scales, rows)
        return dataclasses.replace(self, shape=sliced_shape(self.shape, rows), scales=scales)  # type: ignore[type-var]

    def tensors(self) -> dict[str, Tensor]:
        return {"scales": self.scales}

    def _scale(self, start: int, size: int, device: torch.device) -> Tensor:
        """Scales of the columns start .. start + size, float32, broadcastable to (m, size)."""
        groups = Groups(self.shape, self.quantizer.group_size)
        return groups.spread(self.scales.to(device), start, size).float()


class OneScaled(ScalarCodes):
    """Codes under one scale (1, 1) for the whole matrix, so the same wherever they lie in it.

    For frozen dataclasses whose fields include these three, with `scale_dtype` in the quantizer.
    """

    scales: Tensor

    @property
    def position_free(self) -> bool:
        return True

    def widened(self, by: float) -> Self:
        """The same levels or codewords under a scale so many times as large."""
        scales = round_scales(self.scales.double() * by, self.quantizer.scale_dtype)
        return dataclasses.replace(self, scales=scales)  # type: ignore[type-var]

    def take_rows(self, rows: slice) -> Self:
        return dataclasses.replace(self, shape=sliced_shape(self.shape, rows))  # type: ignore[type-var]


def restored_scales(
    quantizer: Any, shape: tuple[int, int], tensors: Mapping[str, Tensor]
) -> Tensor:
    """Stored scales of a quantizer with `group_size` and `scale_dtype`; FormatError if wrong."""
    grid = Groups(shape, quantizer.group_size).grid
    return checked_tensor(tensors, "scales", grid, SCALE_DTYPES[quantizer.scale_dtype])
