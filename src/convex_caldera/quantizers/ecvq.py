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
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from convex_caldera.coding.bitpack import packed_bytes
from convex_caldera.core.seeds import generator
from convex_caldera.errors import RecipeError
from convex_caldera.quantizers.clustering import TOLERANCE, started, thinned
from convex_caldera.quantizers.codebooks import BlockCodes
from convex_caldera.quantizers.ecsq import header_bytes
from convex_caldera.quantizers.grouped import OneScaled
from convex_caldera.quantizers.groups import (
    SCALE_DTYPES,
    check_group_options,
    check_matrix,
    checked_tensor,
    round_scales,
)
from convex_caldera.quantizers.kmeans import FittedKMeans, KMeans
from convex_caldera.quantizers.normalized import natural_scales
from convex_caldera.quantizers.rate_search import code_within, log_price

LEAST_RATE, MOST_RATE = 0.5, 6.0  # bits of a block: its codes have two more, and eight at most
# The rate that the codebook is chosen for: it is fitted to a sample.
_RATE_SHARE = 0.995
_RATE_TOLERANCE = 1e-3
_TOLERANCE = 2e-5

Floats = NDArray[Any]


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
        if not 1 <= self.dim <= 8 or not LEAST_RATE <= self.bits * self.dim <= MOST_RATE:
            raise RecipeError(
                f"ECVQ has blocks of 1 to 8 columns and {LEAST_RATE:g} to {MOST_RATE:g} bits "
                f"for each, got {self.bits} bits per weight in blocks of {self.dim}"
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

        Cost: k-means and a few prices of a bit on a thin sample, at most `iterations` steps each,
        then fewer steps on at most `sample_size` blocks.
        """
        check_matrix(W, importance, gain)
        natural = natural_scales(W, -1, "rms")
        scale = round_scales(natural, self.scale_dtype)
        blocks = KMeans(
            self.code_bits / self.dim, self.dim, -1, "rms",
            self.iterations, self.sample_size, self.seed, "float32",
        )  # fmt: skip
        shape = (W.shape[0], W.shape[1])
        points, weights = blocks.sample(W, FittedKMeans(blocks, shape, scale, W.new_empty(0)))
        found = entropy_constrained(points, weights, self)
        codebook, costs = torch.from_numpy(found.codebook), torch.from_numpy(found.costs)
        spare = (1 << self.code_bits) - len(codebook)
        stored = torch.cat([codebook, codebook[-1:].expand(spare, -1)])
        return FittedECVQ(
            self,
            shape,
            scale if gain == 1.0 else round_scales(natural * gain, self.scale_dtype),
            stored.to(SCALE_DTYPES[self.scale_dtype]).to(W.device),
            costs,
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
class FittedECVQ(OneScaled, BlockCodes):
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
    def offered(self) -> tuple[Tensor, Tensor]:
        """Codewords in use, and their costs as far as they are known."""
        if self.costs is None:
            return super().offered
        return self.codebook[: len(self.costs)].float(), self.costs.to(self.codebook.device)

    def block_scales(self, first: int, count: int) -> Tensor:
        """The scale of all blocks, (1, 1)."""
        return self.scales.float()


@dataclass(frozen=True, eq=False)
class Priced:
    """A code under a price of a bit: codewords (K, dim), lengths (K,) of their codes, entropy."""

    price: float
    codebook: Floats
    lengths: Floats
    rate: float

    @property
    def costs(self) -> Floats:
        return (self.price * self.lengths).astype(np.float32)


def entropy_constrained(points: Tensor, weights: Tensor, quantizer: ECVQ) -> Priced:
    """The code of least error whose entropy is at most `quantizer.bits` a weight, or just below.

    Points stand for as many blocks as their weight says; all is worked out on the CPU. The price
    is found on a thin sample, from k-means, and set right on all points.
    """
    size, dim = 1 << quantizer.code_bits, quantizer.dim
    rate = _RATE_SHARE * quantizer.bits * dim
    random = generator(quantizer.seed, f"{tuple(points.shape)}", "k-means seeding")
    few = thinned(points, weights, size, random)
    start = started(*few, size, random, quantizer.iterations, TOLERANCE)
    found = Priced(0.0, start, np.zeros(len(start)), math.inf)
    variance = max(float((points.double() ** 2 * weights).sum() / weights.sum()), 1e-30)
    guess = log_price(variance, rate, dim)
    samples = [few, (points.contiguous().numpy(), weights.contiguous().numpy())]
    for sample in samples[len(few[0]) == len(points) :]:
        problem, first = _Problem(*sample), found

        def solve(x: float, lower: Priced | None, problem=problem, first=first) -> Priced:  # type: ignore[no-untyped-def]
            return problem.solve(2.0**x, lower or first, quantizer.iterations)

        found = code_within(solve, rate, dim, guess, _RATE_TOLERANCE * rate)
        guess = math.log2(found.price)
    return found


class _Problem:
    """Points (N, dim) and their weights: which coordinates exist, times the blocks stood for."""

    def __init__(self, x: Floats, weights: Floats):
        self.x, self.weights = x, weights
        stands_for = weights.max(1)
        self.inside = weights / stands_for[:, None]  # 0 where a row's last block has no column
        self.stands_for = stands_for.astype(np.float64)

    def solve(self, price: float, start: Priced, iterations: int) -> Priced:
        """The code under a price where the cost no longer falls, from another code."""
        from convex_caldera.quantizers import kmeans_kernels as kernels

        codebook, lengths, last = start.codebook, start.lengths, np.inf
        for _ in range(iterations):
            costs = (price * lengths).astype(np.float32)
            codes, errors = kernels.nearest(self.x, self.inside, codebook, costs)
            means, _ = kernels.centroids(self.x, self.weights, codes, codebook)
            share = self._shares(codes, len(codebook))
            codebook, lengths = means[share > 0].astype(np.float32), -np.log2(share[share > 0])
            total = float(errors @ self.stands_for)
            if 0 <= last - total <= _TOLERANCE * total:
                break
            last = total
        code = Priced(price, codebook, lengths, 0.0)
        codes, _ = kernels.nearest(self.x, self.inside, codebook, code.costs)
        share = self._shares(codes, len(codebook))
        share = share[share > 0]
        return replace(code, rate=float(-(share * np.log2(share)).sum()))

    def _shares(self, codes: Floats, size: int) -> Floats:
        count = np.bincount(codes, weights=self.stands_for, minlength=size)
        shares: Floats = count / count.sum()
        return shares
