"""Lloyd-Max: the 2^b levels that suit a matrix best, learned and stored with it.

    value = scale of the group * level[code],     levels by `scalar_levels.best_levels`

Levels minimize sum_ij h_j (W_ij - W^_ij)^2 over all scalar codebooks, h the importance of the
columns (Lloyd 1982, Max 1960; the least over the whole range is found, not only a stationary
point). On N(0, 1) one to four bits leave .3634, .1175, .0345 and .0095. Rounding is to the
nearest level, by binary search among midpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from convex_caldera.coding.bitpack import packed_bytes
from convex_caldera.core.seeds import generator
from convex_caldera.errors import RecipeError
from convex_caldera.quantizers.grouped import GroupScaled, restored_scales
from convex_caldera.quantizers.groups import (
    SCALE_DTYPES,
    Groups,
    check_codes,
    check_columns,
    check_finite,
    check_group_options,
    check_matrix,
    checked_tensor,
    round_scales,
)
from convex_caldera.quantizers.normalized import (
    Normalize,
    check_normalize,
    floored,
    natural_scales,
)

_CHUNK = 1 << 22  # weights encoded at a time


@dataclass(frozen=True)
class LloydMax:
    """A learned scalar codebook of 2^bits levels.

    Args:
        bits: 1 to 8.
        group_size: weights of a row that share a scale; 0 the whole row, -1 the whole matrix.
        normalize: "rms" or "absmax" of each group is its scale.
        iterations: of Lloyd's steps at most.
        sample_size: weights that the levels are fitted to; 0 is all of them. The extremes of
            the matrix are always among them.
        seed: of the sample.
        scale_dtype: of scales and levels, "float16", "bfloat16" or "float32".

    Raises:
        RecipeError: an option out of range.
    """

    bits: int = 8
    group_size: int = -1
    normalize: Normalize = "rms"
    iterations: int = 100
    sample_size: int = 0
    seed: int = 0
    scale_dtype: str = "float16"

    kind: ClassVar[str] = "lloyd_max"

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise RecipeError(f"Lloyd-Max has 1 to 8 bits, got {self.bits}")
        check_group_options(self.group_size, self.scale_dtype)
        check_normalize(self.normalize)
        if self.iterations < 1 or self.sample_size < 0:
            raise RecipeError(
                f"iterations are positive and sample_size is >= 0, got {self.iterations}, "
                f"{self.sample_size}"
            )

    @property
    def block(self) -> int:
        return 1

    def fit(
        self,
        W: Tensor,
        *,
        importance: Tensor | None = None,
        gain: float = 1.0,
        tolerance: float | None = None,
    ) -> FittedLloydMax:
        """Scales and levels for W (m, n), rounded as stored; `gain` multiplies the scales only.

        `tolerance` is the relative decrease of the error at which iterations end; 1e-9.

        Raises:
            ShapeError, NumericalError: W is not a finite matrix, or its scales do not fit
                `scale_dtype` (see `groups.round_scales`).

        Cost: three passes over W, and 2^bits * 2^11 * 11 steps of dynamic programming.
        """
        from convex_caldera.quantizers.scalar_levels import best_levels, sorted_points

        check_matrix(W, importance, gain)
        shape = (W.shape[0], W.shape[1])
        natural = natural_scales(W, self.group_size, self.normalize)
        scales = round_scales(natural, self.scale_dtype)
        columns = None if importance is None else floored(importance)
        if 0 < self.sample_size < W.numel():
            sample, weights = self._sample(W, scales, columns)
            points = sorted_points(sample, scales.new_ones(1, 1), -1, weights)
        else:
            points = sorted_points(W, scales, self.group_size, columns)
        levels = best_levels(points, 1 << self.bits, self.iterations, tolerance)
        return FittedLloydMax(
            self,
            shape,
            round_scales(natural * gain, self.scale_dtype),
            torch.from_numpy(levels).to(SCALE_DTYPES[self.scale_dtype]).to(W.device),
        )

    def layout(self, shape: tuple[int, int]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Scales, levels, and `bits` bits per weight."""
        dtype = SCALE_DTYPES[self.scale_dtype]
        return {
            "scales": (dtype, Groups(shape, self.group_size).grid),
            "levels": (dtype, (1 << self.bits,)),
            "codes": (torch.uint8, (packed_bytes(shape[0] * shape[1], self.bits),)),
        }

    def restore(self, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> FittedLloydMax:
        """From `FittedLloydMax.tensors()`; FormatError if shape or type differ."""
        dtype = SCALE_DTYPES[self.scale_dtype]
        levels = checked_tensor(tensors, "levels", (1 << self.bits,), dtype)
        return FittedLloydMax(self, shape, restored_scales(self, shape, tensors), levels)

    def _sample(self, W: Tensor, scales: Tensor, columns: Tensor | None) -> tuple[Tensor, Tensor]:
        """Normalized weights as one row, and their importance; the two extremes come first."""
        flat, n = W.flatten(), W.shape[1]
        random = generator(self.seed, f"{tuple(W.shape)}", "Lloyd-Max sample")
        drawn = torch.randint(flat.numel(), (self.sample_size,), generator=random)
        extremes = torch.stack([flat.argmin(), flat.argmax()]).cpu()
        places = torch.cat([extremes, drawn])
        group = Groups((W.shape[0], n), self.group_size).spread(scales.cpu().float(), 0, n)
        scale = group.expand(W.shape[0], n)[places // n, places % n].double()
        stands_for = torch.full((len(places),), flat.numel() / self.sample_size).double()
        stands_for[:2] = 1.0
        weights = stands_for * scale**2 / max(float(scale.max()) ** 2, 1e-300)
        if columns is not None:
            weights = weights * columns.cpu()[places % n]
        divisor = torch.where(scale == 0, torch.inf, scale)
        return (flat[places.to(W.device)].double().cpu() / divisor)[None], weights


@dataclass(frozen=True, eq=False)
class FittedLloydMax(GroupScaled):
    """LloydMax with scales and levels. Codes are (m, n) uint8, levels ascending.

    A group whose scale is 0 (all its weights are) decodes to zeros.
    """

    quantizer: LloydMax
    shape: tuple[int, int]
    scales: Tensor
    levels: Tensor

    def encode(self, x: Tensor, start: int = 0) -> Tensor:
        """Nearest codes (m, d) of columns start .. start + d."""
        check_columns(x, self.shape, start, 1)
        check_finite(x, "the matrix to encode")
        table = self.levels.to(x.device).float()
        between = (table[1:] + table[:-1]) / 2
        scale = self._scale(start, x.shape[1], x.device)
        divisor = torch.where(scale == 0, torch.inf, scale).expand(x.shape[0], -1)
        step = max(1, _CHUNK // x.shape[1])
        codes = [
            torch.bucketize(rows.float() / part, between, out_int32=True).to(torch.uint8)
            for rows, part in zip(x.split(step), divisor.split(step), strict=True)
        ]
        return torch.cat(codes)

    def decode(self, codes: Tensor, start: int = 0) -> Tensor:
        """Values (m, d), float32: level * scale."""
        check_codes(codes, 1 << self.quantizer.bits)
        table = self.levels.to(codes.device).float()
        return table[codes.long()] * self._scale(start, codes.shape[1], codes.device)

    def tensors(self) -> dict[str, Tensor]:
        return {"scales": self.scales, "levels": self.levels}
