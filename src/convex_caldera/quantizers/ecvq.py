"""Entropy-constrained vector quantization: k-means in which a codeword costs its length.

    minimize sum_i |x_i - c_k(i)|^2 + lambda * length_k(i),    length_k = -log2 p_k

over codewords of `dim` columns and lambda, so that the entropy of the codes is `bits` per weight
(Chou, Lookabaugh & Gray 1989). It starts from four times as many codewords as the rate would
fill, by k-means; what nobody chooses disappears. In two dimensions the hexagons save .17 dB
beside `ecsq`, in four .37 dB at most (the space-filling gain), at a codebook to be stored.

One scale serves the matrix, for the reason given in `ecsq`. Codes need an entropy coder.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from convex_caldera.coding.bitpack import packed_bytes
from convex_caldera.errors import RecipeError
from convex_caldera.quantizers.ecsq import header_bytes, within_rate
from convex_caldera.quantizers.grouped import BlockCodes
from convex_caldera.quantizers.groups import (
    SCALE_DTYPES,
    check_codes,
    check_columns,
    check_finite,
    check_group_options,
    check_matrix,
    checked_tensor,
    round_scales,
    sliced_shape,
)
from convex_caldera.quantizers.kmeans import KMeans, nearest
from convex_caldera.quantizers.normalized import natural_scales

MOST_RATE = 6.0  # bits of a block: its codes have two more, and eight at most
# The rate that the codebook is chosen for: it is fitted to a sample.
_RATE_SHARE = 0.995
_BISECTIONS = 12
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class ECVQ:
    """A codebook for entropy-coded blocks of `dim` columns.

    Args:
        bits: entropy of the codes per weight; bits * dim is .5 to 6, any real number.
        dim: columns of a block.
        iterations: of Lloyd's steps at most, for each lambda.
        sample_size: blocks that the codebook is fitted to at most.
        seed: of sampling and seeding.
        scale_dtype: how scale and codebook are stored, "float16", "bfloat16" or "float32".

    Raises:
        RecipeError: an option out of range.
    """

    bits: float = 2.0
    dim: int = 2
    iterations: int = 25
    sample_size: int = 100_000
    seed: int = 0
    scale_dtype: str = "float16"

    kind: ClassVar[str] = "ecvq"

    def __post_init__(self) -> None:
        object.__setattr__(self, "bits", float(self.bits))
        if not 1 <= self.dim <= 8 or not 0.5 <= self.bits * self.dim <= MOST_RATE:
            raise RecipeError(
                f"ECVQ has blocks of 1 to 8 columns and 0.5 to {MOST_RATE:g} bits for each, got "
                f"{self.bits} bits per weight in blocks of {self.dim}"
            )
        if self.iterations < 1 or self.sample_size < 1:
            raise RecipeError(
                f"iterations and sample_size are positive, got {self.iterations}, "
                f"{self.sample_size}"
            )
        check_group_options(-1, self.scale_dtype)

    @property
    def block(self) -> int:
        return self.dim

    @property
    def code_bits(self) -> int:
        """Width of a code."""
        return math.ceil(self.bits * self.dim) + 2

    def most_coded_bytes(self, shape: tuple[int, int]) -> int:
        """bits * m n / 8, and the header of the stream."""
        blocks = shape[0] * -(-shape[1] // self.dim)
        symbols = int(self.bits * self.dim * blocks / 8)
        return symbols + header_bytes(1 << self.code_bits, blocks)

    def fit(self, W: Tensor, *, importance: Tensor | None = None, gain: float = 1.0) -> FittedECVQ:
        """Scale and codebook for W (m, n), rounded as stored; importance changes nothing.

        `gain` multiplies the scale, which lowers the rate by log2(gain) bits or so.

        Raises:
            ShapeError, NumericalError: W is not a finite matrix, or its scale does not fit
                `scale_dtype` (see `groups.round_scales`).

        Cost: k-means, then 12 bisections of at most `iterations` such steps.
        """
        check_matrix(W, importance, gain)
        natural = natural_scales(W, -1, "rms")
        scale = round_scales(natural, self.scale_dtype)
        start = KMeans(
            self.code_bits / self.dim, self.dim, -1, "rms",
            self.iterations, self.sample_size, self.seed, "float32",
        )  # fmt: skip
        base = start.fit(W)
        points, weights = start.sample(W, base)
        rate = _RATE_SHARE * self.bits * self.dim
        codebook, lengths = entropy_constrained(points, weights, base.codebook, rate, self)
        spare = (1 << self.code_bits) - len(codebook)
        stored = torch.cat([codebook, codebook[-1:].expand(spare, -1)])
        return FittedECVQ(
            self,
            (W.shape[0], W.shape[1]),
            scale if gain == 1.0 else round_scales(natural * gain, self.scale_dtype),
            stored.to(SCALE_DTYPES[self.scale_dtype]).to(W.device),
            lengths,
        )

    def layout(self, shape: tuple[int, int]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """One scale, the codebook, and codes before entropy coding."""
        dtype, blocks = SCALE_DTYPES[self.scale_dtype], shape[0] * -(-shape[1] // self.dim)
        return {
            "scales": (dtype, (1, 1)),
            "codebook": (dtype, (1 << self.code_bits, self.dim)),
            "codes": (torch.uint8, (packed_bytes(blocks, self.code_bits),)),
        }

    def restore(self, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> FittedECVQ:
        """From `FittedECVQ.tensors()`; FormatError if shape or type differ."""
        dtype = SCALE_DTYPES[self.scale_dtype]
        scale = checked_tensor(tensors, "scales", (1, 1), dtype)
        size = (1 << self.code_bits, self.dim)
        return FittedECVQ(self, shape, scale, checked_tensor(tensors, "codebook", size, dtype))


@dataclass(frozen=True, eq=False)
class FittedECVQ(BlockCodes):
    """ECVQ with its codebook, the last codeword repeated where fewer are used. Codes (m, blocks).

    `costs` of the codewords used, lambda * length, are not stored: a restored quantizer encodes to
    the nearest.
    """

    quantizer: ECVQ
    shape: tuple[int, int]
    scales: Tensor
    codebook: Tensor
    costs: Tensor | None = None

    @property
    def position_free(self) -> bool:
        return True

    def encode(self, x: Tensor, start: int = 0) -> Tensor:
        """Codes (m, ceil(d / dim)), uint8, of columns start .. start + d; missing ones are free."""
        dim = self.quantizer.dim
        check_columns(x, self.shape, start, dim)
        check_finite(x, "the matrix to encode")
        width = -(-x.shape[1] // dim)
        weights = torch.nn.functional.pad(torch.ones(x.shape[1]), (0, width * dim - x.shape[1]))
        padded = torch.nn.functional.pad(x.float(), (0, width * dim - x.shape[1]))
        scale = float(self.scales)
        points = (padded / (scale if scale > 0 else float("inf"))).reshape(-1, dim)
        used = self.codebook if self.costs is None else self.codebook[: len(self.costs)]
        codes = nearest(points, weights.view(-1, dim).to(x.device), used, self.costs)
        return codes.to(torch.uint8).view(x.shape[0], width)

    def decode(self, codes: Tensor, start: int = 0) -> Tensor:
        """Values (m, d), float32: codeword * scale."""
        check_codes(codes, self.codebook.shape[0])
        table = self.codebook.to(codes.device).float()
        values = table[codes.long()] * self.scales.float().to(codes.device)
        width = min(codes.shape[1] * self.quantizer.dim, self.shape[1] - start)
        return values.flatten(1)[:, :width]

    def take_rows(self, rows: slice) -> FittedECVQ:
        shape = sliced_shape(self.shape, rows)
        return FittedECVQ(self.quantizer, shape, self.scales, self.codebook, self.costs)


def entropy_constrained(
    points: Tensor, weights: Tensor, start: Tensor, rate: float, quantizer: ECVQ
) -> tuple[Tensor, Tensor]:
    """(codebook (K, dim), lambda * length (K,)) of least error with at most `rate` bits a block.

    Points stand for as many blocks as their weight says; all is worked out on the CPU.
    """
    stands_for = weights.amax(1)
    inside = weights / stands_for[:, None]  # 0 where a row's last block has no column
    problem = _Problem(points.contiguous().numpy(), inside.numpy(), stands_for.double().numpy())
    variance = max(float((points.double() ** 2 * weights).sum() / weights.sum()), 1e-30)
    low, high = math.log2(variance) - 2 * rate / quantizer.dim - 6, math.log2(variance) + 6
    first = start.float().cpu().numpy()

    def solve(price: float) -> tuple[np.ndarray, np.ndarray, float]:
        return problem.solve(first, price, quantizer.iterations)

    codebook, costs, _ = within_rate(solve, rate, low, high, _BISECTIONS)
    return torch.from_numpy(codebook), torch.from_numpy(costs)


@dataclass(frozen=True, eq=False)
class _Problem:
    """Points (N, dim), which of their coordinates exist, and how many blocks each stands for."""

    x: np.ndarray
    inside: np.ndarray
    stands_for: np.ndarray

    def solve(
        self, codebook: np.ndarray, price: float, iterations: int
    ) -> tuple[np.ndarray, np.ndarray, float]:
        """(codebook, costs, entropy) under a price of a bit, where the cost no longer falls."""
        from convex_caldera.quantizers import kmeans_kernels as kernels

        weights = (self.inside * self.stands_for[:, None]).astype(np.float32)
        costs, last = np.zeros(len(codebook), np.float32), np.inf
        for _ in range(iterations):
            codes, errors = kernels.nearest(self.x, self.inside, codebook, costs)
            means, _ = kernels.centroids(self.x, weights, codes, codebook)
            share = self._shares(codes, len(codebook))
            codebook = means[share > 0].astype(np.float32)
            costs = (-price * np.log2(share[share > 0])).astype(np.float32)
            total = float((errors * self.stands_for).sum())
            if 0 <= last - total <= _TOLERANCE * total:
                break
            last = total
        codes, _ = kernels.nearest(self.x, self.inside, codebook, costs)
        share = self._shares(codes, len(codebook))
        share = share[share > 0]
        return codebook, costs, float(-(share * np.log2(share)).sum())

    def _shares(self, codes: np.ndarray, size: int) -> np.ndarray:
        count = np.bincount(codes, weights=self.stands_for, minlength=size)
        shares: np.ndarray = count / count.sum()
        return shares
