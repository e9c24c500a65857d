"""Vector quantization: a learned codebook of 2^(bits * dim) vectors of `dim` columns.

    block of a row = scale of its group * codeword,     codewords fitted by weighted k-means

The codebook minimizes sum_i sum_j h_ij s_i^2 (x_ij - c_kj)^2 over the blocks x_i = W_i / s_i of
the matrix, h the importance of the columns (usually diag H), by `clustering`. Large matrices are
fitted on a sample in which the longest blocks always are, each point with the weight of those it
stands for. Codebook and scales are stored, and counted. `bits` are per weight: 2 bits in blocks
of 4 are 256 codewords.
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
from convex_caldera.quantizers.clustering import TOLERANCE, cluster
from convex_caldera.quantizers.codebooks import BlockCodes, divisor
from convex_caldera.quantizers.groups import (
    SCALE_DTYPES,
    Groups,
    check_group_options,
    check_matrix,
    checked_tensor,
    round_scales,
    sliced_shape,
)
from convex_caldera.quantizers.normalized import (
    Normalize,
    check_normalize,
    floored,
    natural_scales,
)

MAX_CODE_BITS = 12
MAX_DIM = 32
# Points with the longest blocks that every sample holds: a codebook must know its extremes.
_EXTREMES = 256


@dataclass(frozen=True)
class KMeans:
    """A codebook for blocks of `dim` columns.

    Args:
        bits: per weight; bits * dim must be whole, 1 to 12.
        dim: columns of a block, 1 to 32; the mission's `block_size`.
        group_size: weights that share a scale, a multiple of dim; 0 a row, -1 the matrix.
        normalize: "rms" or "absmax" of each group is its scale.
        iterations: of Lloyd's steps at most.
        sample_size: blocks that the codebook is fitted to at most.
        seed: of sampling and seeding.
        scale_dtype: of scales and codebook, "float16", "bfloat16" or "float32".

    Raises:
        RecipeError: an option out of range, or two that contradict each other.
    """

    bits: float = 2.0
    dim: int = 4
    group_size: int = -1
    normalize: Normalize = "rms"
    iterations: int = 25
    sample_size: int = 200_000
    seed: int = 0
    scale_dtype: str = "float16"

    kind: ClassVar[str] = "kmeans"

    def __post_init__(self) -> None:
        object.__setattr__(self, "bits", float(self.bits))  # 2 and 2.0 have one record
        if not 1 <= self.dim <= MAX_DIM:
            raise RecipeError(f"k-means blocks have 1 to {MAX_DIM} columns, got dim {self.dim}")
        code_bits = self.bits * self.dim
        if code_bits != int(code_bits) or not 1 <= code_bits <= MAX_CODE_BITS:
            raise RecipeError(
                f"a code has a whole number of 1 to {MAX_CODE_BITS} bits; {self.bits} bits per "
                f"weight in blocks of {self.dim} are {code_bits:g}"
            )
        check_group_options(self.group_size, self.scale_dtype)
        check_normalize(self.normalize)
        if self.group_size > 0 and self.group_size % self.dim:
            raise RecipeError(
                f"group_size {self.group_size} is no multiple of the block of {self.dim} columns"
            )
        if self.iterations < 1 or self.sample_size < 1:
            raise RecipeError(
                f"iterations and sample_size are positive, got {self.iterations}, "
                f"{self.sample_size}"
            )

    @property
    def block(self) -> int:
        return self.dim

    @property
    def code_bits(self) -> int:
        """Bits of one code, that of a block."""
        return int(self.bits * self.dim)

    @property
    def num_codewords(self) -> int:
        return 1 << self.code_bits

    def fit(
        self,
        W: Tensor,
        *,
        importance: Tensor | None = None,
        gain: float = 1.0,
        tolerance: float | None = None,
    ) -> FittedKMeans:
        """Scales and codebook for W (m, n), both rounded as stored.

        The importance also steers `encode` of what is returned; it is not stored. `gain`
        multiplies the scales only. `tolerance` is the relative decrease of the error below which
        iterations end; 1e-5, or 1e-9 in one dimension.

        Raises:
            ShapeError, NumericalError: W is not a finite matrix, or its scales do not fit
                `scale_dtype` (see `groups.round_scales`).

        Cost: iterations * points * 2^(bits * dim) * dim, points at most `sample_size`.
        """
        check_matrix(W, importance, gain)
        shape = (W.shape[0], W.shape[1])
        natural = natural_scales(W, self.group_size, self.normalize)
        scales = round_scales(natural, self.scale_dtype)
        columns = None if importance is None else floored(importance)
        unit = FittedKMeans(self, shape, scales, torch.empty(0), columns)
        points, weights = self.sample(W, unit)
        codebook = best_codebook(points, weights, self, tolerance)
        return FittedKMeans(
            self,
            shape,
            scales if gain == 1.0 else round_scales(natural * gain, self.scale_dtype),
            codebook.to(SCALE_DTYPES[self.scale_dtype]).to(W.device),
            columns,
        )

    def layout(self, shape: tuple[int, int]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Scales, codebook, and `code_bits` bits for every `dim` columns begun."""
        dtype, blocks = SCALE_DTYPES[self.scale_dtype], shape[0] * -(-shape[1] // self.dim)
        return {
            "scales": (dtype, Groups(shape, self.group_size).grid),
            "codebook": (dtype, (self.num_codewords, self.dim)),
            "codes": (torch.uint8, (packed_bytes(blocks, self.code_bits),)),
        }

    def restore(self, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> FittedKMeans:
        """From `FittedKMeans.tensors()`; FormatError if shape or type differ."""
        dtype = SCALE_DTYPES[self.scale_dtype]
        grid = Groups(shape, self.group_size).grid
        codebook = checked_tensor(tensors, "codebook", (self.num_codewords, self.dim), dtype)
        return FittedKMeans(self, shape, checked_tensor(tensors, "scales", grid, dtype), codebook)

    def sample(self, W: Tensor, unit: FittedKMeans) -> tuple[Tensor, Tensor]:
        """Normalized blocks (N, dim), and the weight of each of their coordinates."""
        count = W.shape[0] * unit.blocks
        if count <= self.sample_size:
            chosen, stands_for = torch.arange(count), torch.ones(count)
        else:
            chosen, stands_for = self._choose(W, unit, count)
        row, block = chosen // unit.blocks, chosen % unit.blocks
        columns = block[:, None] * self.dim + torch.arange(self.dim)
        inside = columns < W.shape[1]
        columns = columns.clamp(max=W.shape[1] - 1)
        x = W[row.to(W.device)[:, None], columns.to(W.device)].float().cpu()
        scale = unit.block_scales(0, unit.blocks).cpu().expand(W.shape[0], unit.blocks)[row, block]
        weights = torch.ones(W.shape[1]) if unit.importance is None else unit.importance.cpu()
        weights = weights[columns] * inside * stands_for[:, None] * relative(scale)[:, None] ** 2
        return x * inside / divisor(scale)[:, None], weights

    def _choose(self, W: Tensor, unit: FittedKMeans, count: int) -> tuple[Tensor, Tensor]:
        """Block numbers: the longest ones, and a seeded sample of the rest with its weight."""
        lengths = torch.cat([unit.lengths(rows) for rows in W.split(4096)])
        extremes = lengths.topk(min(_EXTREMES, self.sample_size // 2)).indices.cpu()
        wanted = self.sample_size - extremes.numel()
        random = generator(self.seed, f"{tuple(W.shape)}", "k-means sample")
        drawn = torch.randint(count, (wanted,), generator=random)
        taken = torch.zeros(count, dtype=torch.bool)
        taken[drawn] = True
        taken[extremes] = False
        rest = taken.nonzero().flatten()
        stands_for = torch.full((rest.numel(),), (count - extremes.numel()) / rest.numel())
        return torch.cat([extremes, rest]), torch.cat([torch.ones(extremes.numel()), stands_for])


@dataclass(frozen=True, eq=False)
class FittedKMeans(BlockCodes):
    """KMeans with scales and codebook. Codes are (m, ceil(n / dim)), uint8 or int32.

    With an `importance` (n,), which a restored one does not have, `encode` is nearest under it.
    """

    quantizer: KMeans
    shape: tuple[int, int]
    scales: Tensor
    codebook: Tensor
    importance: Tensor | None = None

    @property
    def position_free(self) -> bool:
        return self.scales.numel() == 1 and self.importance is None

    def take_rows(self, rows: slice) -> FittedKMeans:
        scales = Groups(self.shape, self.quantizer.group_size).take_rows(self.scales, rows)
        shape = sliced_shape(self.shape, rows)
        return FittedKMeans(self.quantizer, shape, scales, self.codebook, self.importance)

    def block_scales(self, first: int, count: int) -> Tensor:
        """Scales of blocks first .. first + count of every row, broadcastable to (m, count)."""
        groups = Groups(self.shape, self.quantizer.group_size)
        if self.scales.shape[1] == 1:
            return self.scales.float()
        columns = torch.arange(first, first + count, device=self.scales.device)
        return self.scales[:, columns * self.quantizer.dim // groups.width].float()

    def lengths(self, rows: Tensor) -> Tensor:
        """Squared norms of the blocks of some rows, in units of the matrix, flat."""
        pad = self.blocks * self.quantizer.dim - rows.shape[1]
        x = torch.nn.functional.pad(rows.float(), (0, pad))
        return x.view(rows.shape[0], self.blocks, -1).square().sum(-1).flatten()

    def block_weights(self, start: int, size: int, device: torch.device) -> Tensor:
        """(1, dim) or (blocks, dim): importance of the columns, zero for those that are missing."""
        if self.importance is None:
            return super().block_weights(start, size, device)
        weights = self.importance[start : start + size].to(device)
        dim = self.quantizer.dim
        return torch.nn.functional.pad(weights, (0, -size % dim)).view(-1, dim)


def relative(scale: Tensor) -> Tensor:
    """Scales over their largest, so that squares neither overflow nor vanish."""
    largest = float(scale.max())
    return scale / largest if largest > 0 else torch.ones_like(scale)


def best_codebook(
    points: Tensor, weights: Tensor, quantizer: KMeans, tolerance: float | None = None
) -> Tensor:
    """Codebook (K, dim), float32, of points (N, dim) under weights (N, dim), both on the CPU.

    `clustering.cluster`; in one dimension the globally best levels.
    """
    if quantizer.dim == 1:
        from convex_caldera.quantizers.scalar_levels import best_levels, distinct_points

        flat = distinct_points(points.flatten().double().numpy(), weights.flatten().numpy())
        levels = best_levels(flat, quantizer.num_codewords, quantizer.iterations, tolerance)
        return torch.from_numpy(levels).float()[:, None]
    return cluster(
        points, weights, quantizer.num_codewords, quantizer.seed, quantizer.iterations,
        TOLERANCE if tolerance is None else tolerance,
    )  # fmt: skip
