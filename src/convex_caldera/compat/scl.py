"""Source-coding baselines for one tensor: rate, distortion, codebook and indices.

    from convex_caldera.compat import SCLQuantizationParams, scl_quantize
    result = scl_quantize(W, SCLQuantizationParams(num_bits=4, method="lloyd_max"))

Differences from the original: Lloyd-Max levels are the globally best ones, k-means is seeded by
k-means++ and repairs empty cells; `tolerance` is relative to the error instead of absolute, so
that small weights are fitted as well as large ones; "mae" is how distortion is reported, for
every method, while fitting is always by squared error. Entropy and the bytes that all of it takes
stand beside the nominal rate, which leaves the codebook out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from convex_caldera.coding import Rans
from convex_caldera.coding.symbols import entropy, symbol_bits
from convex_caldera.core.protocols import FittedQuantizer, Quantizer
from convex_caldera.core.terms import Coded
from convex_caldera.errors import RecipeError, ShapeError
from convex_caldera.quantizers.clipped_uniform import ClippedUniform, FittedClippedUniform
from convex_caldera.quantizers.groups import PER_TENSOR
from convex_caldera.quantizers.kmeans import FittedKMeans, KMeans
from convex_caldera.quantizers.lloyd_max import FittedLloydMax, LloydMax

Method = Literal["scalar", "scalar_uniform", "lloyd_max", "vector", "vector_vq"]
DistortionMetric = Literal["mse", "mae"]
ORIGINAL_BITS = 16


@dataclass(frozen=True)
class SCLQuantizationParams:
    """What to quantize with.

    Args:
        num_bits: of one index: of a weight, or of a whole vector.
        method: "scalar" (or "scalar_uniform"), "lloyd_max", "vector" (or "vector_vq").
        vector_dim: weights of a vector; 1 for the scalar methods.
        num_codebook_entries: instead of num_bits, a power of two.
        max_iterations: of fitting a codebook.
        tolerance: iterations of "lloyd_max" and "vector" end when the error falls by no more than
            this part of itself.
        random_seed: of k-means.
        distortion_metric: "mse" or "mae", how distortion is reported.
        group_size: weights of a row that share a scale; 0 a row, -1 the whole tensor.
        clip_ratio: part of the weights that the range of "scalar" covers.

    Raises:
        RecipeError: a value out of range, or two that contradict each other.
    """

    num_bits: int = 2
    method: Method = "scalar"
    vector_dim: int = 1
    num_codebook_entries: int | None = None
    max_iterations: int = 100
    tolerance: float = 1e-6
    random_seed: int = 42
    distortion_metric: DistortionMetric = "mse"
    group_size: int = PER_TENSOR
    clip_ratio: float = 1.0

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise RecipeError(f"method is one of {get_args(Method)}, got {self.method!r}")
        if self.distortion_metric not in get_args(DistortionMetric):
            raise RecipeError(f"distortion_metric is mse or mae, got {self.distortion_metric!r}")
        if self.vector_dim < 1:
            raise RecipeError(f"vector_dim is at least 1, got {self.vector_dim}")
        if self.vector_dim != 1 and not self.is_vector:
            raise RecipeError(f"{self.method} has no vectors; vector_dim is {self.vector_dim}")
        if self.tolerance < 0:
            raise RecipeError(f"tolerance is >= 0, got {self.tolerance}")
        entries = self.num_codebook_entries
        if entries is not None and (entries < 2 or entries & (entries - 1)):
            raise RecipeError(f"num_codebook_entries is a power of two above 1, got {entries}")
        self.quantizer()  # refuses the rest

    @property
    def is_vector(self) -> bool:
        return self.method in ("vector", "vector_vq")

    @property
    def index_bits(self) -> int:
        """Bits of one index."""
        entries = self.num_codebook_entries
        return self.num_bits if entries is None else entries.bit_length() - 1

    def quantizer(self) -> Quantizer:
        """The same as a quantizer of this library."""
        bits, group, iterations = self.index_bits, self.group_size, self.max_iterations
        dtype = "float32" if group == PER_TENSOR else "float16"
        if self.is_vector:
            dim = self.vector_dim
            return KMeans(bits / dim, dim, group, "rms", iterations, 200_000, self.random_seed)
        if self.method == "lloyd_max":
            return LloydMax(bits, group, "rms", iterations, 0, self.random_seed)
        return ClippedUniform(bits, group, self.clip_ratio, dtype)


@dataclass(frozen=True, eq=False)
class SCLQuantizationResult:
    """What came out.

    `rate` is nominal, bits of an index per weight; `entropy` what an ideal coder of the indices
    needs; `stored_bits` all bytes with codebook and scales, indices coded by rANS where that is
    shorter. `codebook` has one row per entry, in units of a scale where groups have one; it is
    None for "scalar" with groups, which has a range for each. `compression_ratio` is 16 /
    stored_bits.
    """

    quantized: Tensor
    codebook: Tensor | None
    indices: Tensor
    rate: float
    entropy: float
    stored_bits: float
    distortion: float
    compression_ratio: float
    num_codebook_entries: int
    method: str


def scl_quantize(
    weights: Tensor, params: SCLQuantizationParams | None = None
) -> SCLQuantizationResult:
    """Quantize one tensor of any shape; the last dimension is that of groups.

    Raises:
        ShapeError: the tensor is empty.
        NumericalError: it has NaN or infinite entries.
        RecipeError: the codebook has more entries than there are weights or vectors.
    """
    params = params or SCLQuantizationParams()
    if weights.numel() == 0:
        raise ShapeError(f"nothing to quantize in a tensor of shape {tuple(weights.shape)}")
    W = _matrix(weights.detach(), params)
    blocks = W.shape[0] * -(-W.shape[1] // params.vector_dim)
    entries = 1 << params.index_bits
    if params.method not in ("scalar", "scalar_uniform") and entries > blocks:
        raise RecipeError(
            f"a codebook of {entries} entries is larger than the {blocks} "
            f"{'vectors' if params.is_vector else 'weights'}; choose fewer num_bits"
        )
    quantizer = params.quantizer()
    fitted = _fitted(W, quantizer, params.tolerance)
    codes = fitted.encode(W)
    quantized = fitted.decode(codes).reshape(weights.shape)
    term = Coded(codes, fitted, Rans(symbol_bits(quantizer)))
    stored = 8 * term.stored_bytes() / weights.numel()
    error = (quantized - weights.float()).double()
    mse = params.distortion_metric == "mse"
    return SCLQuantizationResult(
        quantized=quantized.to(weights.dtype),
        codebook=_codebook(fitted),
        indices=codes.flatten() if params.is_vector else codes.reshape(weights.shape),
        rate=params.index_bits / params.vector_dim,
        entropy=entropy(term.packed, symbol_bits(quantizer)) / weights.numel(),
        stored_bits=stored,
        distortion=float((error.square() if mse else error.abs()).mean()),
        compression_ratio=ORIGINAL_BITS / stored,
        num_codebook_entries=entries,
        method=params.method,
    )


def _fitted(W: Tensor, quantizer: Quantizer, tolerance: float) -> FittedQuantizer:
    if isinstance(quantizer, KMeans | LloydMax):
        return quantizer.fit(W, tolerance=tolerance)
    return quantizer.fit(W)


def _matrix(weights: Tensor, params: SCLQuantizationParams) -> Tensor:
    """Rows of the last dimension; one row where vectors would straddle rows otherwise."""
    W = weights.float().reshape(-1, weights.shape[-1] if weights.dim() else 1)
    straddles = params.group_size == PER_TENSOR and W.shape[1] % params.vector_dim
    return W.reshape(1, -1) if straddles else W


def _codebook(fitted: FittedQuantizer) -> Tensor | None:
    """(entries, dim) float32; real values where one scale serves all."""
    match fitted:
        case FittedKMeans():
            scale = fitted.scales.float() if fitted.scales.numel() == 1 else 1.0
            return fitted.codebook.float() * scale
        case FittedLloydMax():
            scale = fitted.scales.float() if fitted.scales.numel() == 1 else 1.0
            return (fitted.levels.float() * scale).reshape(-1, 1)
        case FittedClippedUniform() if fitted.steps.numel() == 1:
            codes = torch.arange(1 << fitted.quantizer.bits).float()
            return (fitted.lows.float() + codes * fitted.steps.float()).reshape(-1, 1)
    return None
