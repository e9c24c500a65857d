"""Figures of one compression under the mission's names, each with one definition.

Different from the original: bits are bytes stored times 8 over the number of original weights,
low-rank factors and scales included (there: the codes' nominal width alone); an error of zero is
reported as zero; `duality_gap` is None unless a program was solved and bounded.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from convex_caldera.core.terms import CompressedLayer
from convex_caldera.errors import DataError, NumericalError, RecipeError, ShapeError
from convex_caldera.linalg.finite import all_finite

MEGABYTE = 1e6
RANK_TOLERANCE = 1e-6


@runtime_checkable
class Stored(Protocol):
    """Anything that knows how many bytes it takes: a CompressedLayer or a ConvexCalderaResult."""

    def stored_bytes(self) -> int: ...


@dataclass(frozen=True)
class CompressionMetrics:
    """What `evaluate_compression` returns; None where nothing was given to compute it from.

    Attributes:
        bits_per_parameter: all stored bits over original weights.
        relative_error: ||W - W^||_F / ||W||_F.
        compression_ratio: original bytes over stored bytes.
        model_size_mb: stored bytes / 10^6.
        effective_rank: of the stored low-rank part; 0 without one.
        stable_rank: ||W^||_F^2 / ||W^||_2^2.
        entropy_rank: exp of the entropy of W^'s normalized singular values.
        relative_loss: tr(E H E^T) / tr(W H W^T), if H was given.
        duality_gap: primal - dual of the convex program.
        accuracy_drop: original - compressed. perplexity_increase: compressed - original.
    """

    bits_per_parameter: float
    relative_error: float
    compression_ratio: float
    model_size_mb: float
    effective_rank: int
    stable_rank: float
    entropy_rank: float
    relative_loss: float | None = None
    duality_gap: float | None = None
    accuracy_drop: float | None = None
    perplexity_increase: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compute_bits_per_parameter(stored: Stored | int, num_weights: int) -> float:
    """Bits stored per original weight; `stored` is an object that knows its bytes, or bytes."""
    if num_weights < 1:
        raise DataError(f"there must be at least one original weight, got {num_weights}")
    return 8 * _bytes(stored) / num_weights


def compute_compression_ratio(
    stored: Stored | int, num_weights: int, original_bits: float = 16.0
) -> float:
    """Original size over stored size; originals have 16 bits per weight unless said otherwise."""
    return original_bits / compute_bits_per_parameter(stored, num_weights)


def compute_model_size_mb(stored: Stored | int) -> float:
    """Megabytes (10^6 bytes) stored."""
    return _bytes(stored) / MEGABYTE


def compute_relative_error(W: Tensor, W_hat: Tensor) -> float:
    """||W - W^||_F / ||W||_F in float64; 0 / 0 is 0, anything else over 0 is infinite."""
    _check_pair(W, W_hat)
    error = float((W.double() - W_hat.double()).norm())
    norm = float(W.double().norm())
    if norm == 0.0:
        return math.inf if error > 0 else 0.0
    return error / norm


def compute_relative_loss(W: Tensor, W_hat: Tensor, H: Tensor) -> float:
    """tr(E H E^T) / tr(W H W^T) with E = W - W^, for H (n, n) or its diagonal (n,); not rooted."""
    _check_pair(W, W_hat)
    n = W.shape[1]
    if tuple(H.shape) not in ((n,), (n, n)):
        raise ShapeError(f"W is {tuple(W.shape)}, so H is ({n}, {n}) or ({n},), got {H.shape}")

    def weighed(A: Tensor) -> float:
        AH = A * H.double() if H.dim() == 1 else A @ H.double()
        return float((AH * A).sum())

    loss, energy = weighed(W.double() - W_hat.double()), weighed(W.double())
    if energy == 0.0:
        return math.inf if loss > 0 else 0.0
    return loss / energy


def compute_accuracy_drop(original: float, compressed: float) -> float:
    """original - compressed, in the unit of both; negative where compression gained."""
    _check_finite(original=original, compressed=compressed)
    return original - compressed


def compute_perplexity_increase(original: float, compressed: float) -> float:
    """compressed - original. Both must come from one protocol (tokens, windows, BOS)."""
    _check_finite(original=original, compressed=compressed)
    if min(original, compressed) < 1:
        raise DataError(f"a perplexity is at least 1, got {original} and {compressed}")
    return compressed - original


def compute_singular_values(W: Tensor, count: int | None = None) -> Tensor:
    """The largest `count` singular values (all by default), descending, float64."""
    if W.dim() != 2:
        raise ShapeError(f"singular values are of a matrix, got {tuple(W.shape)}")
    if not all_finite(W):
        raise NumericalError("the matrix has NaN or infinite entries")
    values: Tensor = torch.linalg.svdvals(W.double())
    return values[:count]


def compute_effective_rank(W: Tensor, tolerance: float = RANK_TOLERANCE) -> int:
    """How many singular values exceed `tolerance` times the largest."""
    values = compute_singular_values(W)
    return int((values > tolerance * values.max()).sum()) if len(values) else 0


def compute_stable_rank(W: Tensor) -> float:
    """||W||_F^2 / ||W||_2^2, between 1 and the rank; 0 for a zero matrix."""
    energy = compute_singular_values(W).square()
    return float(energy.sum() / energy.max()) if float(energy.max()) > 0 else 0.0


def compute_entropy_rank(W: Tensor) -> float:
    """exp(-sum p log p), p = singular values over their sum (Roy and Vetterli, 2007)."""
    values = compute_singular_values(W)
    if float(values.sum()) == 0.0:
        return 0.0
    return float(torch.special.entr(values / values.sum()).sum().exp())


def evaluate_compression(
    W: Tensor,
    compressed: Any,
    *,
    stored_bytes: int | None = None,
    H: Tensor | None = None,
    accuracy: tuple[float, float] | None = None,
    perplexity: tuple[float, float] | None = None,
    original_bits: float = 16.0,
) -> CompressionMetrics:
    """All figures of one compressed matrix.

    Args:
        W: the original (m, n).
        compressed: a ConvexCalderaResult, CalderaDecomposition or CompressedLayer; or the
            compressed matrix itself, and then `stored_bytes` says what it takes.
        H: metric for `relative_loss`.
        accuracy, perplexity: (original, compressed) of the whole model, measured by the caller.
        original_bits: bits per weight of the original.

    Raises:
        RecipeError: nothing says how many bytes are stored.
        ShapeError, DataError: shapes or figures that cannot be.
    """
    W_hat, stored = _matrix_and_bytes(compressed, stored_bytes)
    layer = getattr(compressed, "layer", compressed)
    rank = getattr(compressed, "effective_rank", getattr(layer, "rank", 0))
    return CompressionMetrics(
        bits_per_parameter=compute_bits_per_parameter(stored, W.numel()),
        relative_error=compute_relative_error(W, W_hat),
        compression_ratio=compute_compression_ratio(stored, W.numel(), original_bits),
        model_size_mb=compute_model_size_mb(stored),
        effective_rank=int(rank),
        stable_rank=compute_stable_rank(W_hat),
        entropy_rank=compute_entropy_rank(W_hat),
        relative_loss=None if H is None else compute_relative_loss(W, W_hat, H),
        duality_gap=getattr(compressed, "duality_gap", None),
        accuracy_drop=None if accuracy is None else compute_accuracy_drop(*accuracy),
        perplexity_increase=None
        if perplexity is None
        else compute_perplexity_increase(*perplexity),
    )


def _matrix_and_bytes(compressed: Any, stored_bytes: int | None) -> tuple[Tensor, int]:
    """The compressed matrix and what it takes."""
    layer = getattr(compressed, "layer", compressed)
    if isinstance(compressed, Tensor):
        if stored_bytes is None:
            raise RecipeError("a plain matrix does not say what it takes; give stored_bytes")
        return compressed, stored_bytes
    if not isinstance(layer, Stored):
        raise RecipeError(f"{type(compressed).__name__} does not say how many bytes it stores")
    W_hat = layer.decode() if isinstance(layer, CompressedLayer) else compressed.W_compressed
    return W_hat, layer.stored_bytes() if stored_bytes is None else stored_bytes


def _bytes(stored: Stored | int) -> int:
    count = stored.stored_bytes() if isinstance(stored, Stored) else stored
    if count <= 0:
        raise DataError(f"stored bytes must be positive, got {count}")
    return count


def _check_pair(W: Tensor, W_hat: Tensor) -> None:
    if W.shape != W_hat.shape or W.dim() != 2:
        raise ShapeError(f"need two matrices of one shape, got {W.shape} and {W_hat.shape}")


def _check_finite(**figures: float) -> None:
    for name, value in figures.items():
        if not math.isfinite(value):
            raise DataError(f"the {name} figure is {value}; measure it again")
