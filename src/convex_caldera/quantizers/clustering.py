"""Codewords for weighted points: k-means++ and Lloyd's steps, on few points first, then on all.

Lloyd's alternation (Linde, Buzo & Gray 1980) started by k-means++ (Arthur & Vassilvitskii 2007).
Most of the way is gone on a thin sample, which brings the codewords nearly to where all points
would have them; a few steps on all points end it. A codeword that loses all its points is put on
the worst-served one.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from convex_caldera.core.seeds import generator

Floats = NDArray[np.float32]
# Points of a sample per codeword, at least so many altogether, and its farthest ones.
_PER_CODEWORD, _LEAST_POINTS, _EXTREMES = 64, 8192, 256
# Codebooks up to _FEW_CODEWORDS have so many starts: among few a bad one stays bad.
_STARTS, _FEW_CODEWORDS = 4, 64
# Relative decrease of the error below which iterations end.
TOLERANCE = 1e-5
# The same for steps on all points after those on a sample.
_LAST_TOLERANCE = 2e-4


def cluster(
    points: Tensor, weights: Tensor, size: int, seed: int, iterations: int, tolerance: float
) -> Tensor:
    """Codebook (size, dim), float32, of points (N, dim) under weights (N, dim), both on the CPU.

    `iterations` at most from every start, until the error falls by less than `tolerance` of
    itself; again on all points, until by less than 2e-4. Pure: neither argument is changed.
    """
    random = generator(seed, f"{tuple(points.shape)}", "k-means seeding")
    few = thinned(points, weights, size, random)
    codebook = started(*few, size, random, iterations, tolerance)
    if len(few[0]) < len(points):
        last = max(tolerance, _LAST_TOLERANCE)
        codebook = lloyd(_array(points), _array(weights), codebook, iterations, last)[0]
    return torch.from_numpy(codebook)


def started(
    x: Floats, w: Floats, size: int, random: torch.Generator, iterations: int, tolerance: float
) -> Floats:
    """The best codebook of a few starts; large ones, which are all alike, have one."""
    starts = _STARTS if size <= _FEW_CODEWORDS else 1
    found = [lloyd(x, w, seeded(x, w, size, random), iterations, tolerance) for _ in range(starts)]
    return min(found, key=lambda one: one[1])[0]


def thinned(
    points: Tensor, weights: Tensor, size: int, random: torch.Generator
) -> tuple[Floats, Floats]:
    """A sample enough for `size` codewords: the farthest points, and some of the rest, heavier."""
    x, w = _array(points), _array(weights)
    wanted = max(_PER_CODEWORD * size, _LEAST_POINTS)
    if len(x) <= 2 * wanted:
        return x, w
    energy = (w * x * x).sum(1)
    far = np.argpartition(energy, -_EXTREMES)[-_EXTREMES:]
    rest = np.ones(len(x), bool)
    rest[far] = False
    others = np.flatnonzero(rest)
    drawn = np.sort(others[torch.randperm(len(others), generator=random)[:wanted].numpy()])
    share = np.float32(len(others) / wanted)
    return np.concatenate([x[far], x[drawn]]), np.concatenate([w[far], w[drawn] * share])


def seeded(x: Floats, w: Floats, size: int, random: torch.Generator) -> Floats:
    """k-means++ codewords (size, dim)."""
    from convex_caldera.quantizers import kmeans_kernels as kernels

    draws = torch.rand(size, generator=random, dtype=torch.float64)
    codebook: Floats = kernels.seed_codebook(x, w, draws.numpy())
    return codebook


def lloyd(
    x: Floats, w: Floats, codebook: Floats, iterations: int, tolerance: float
) -> tuple[Floats, float]:
    """The codebook after Lloyd's steps from another, and the error before the last of them."""
    from convex_caldera.quantizers import kmeans_kernels as kernels

    last, total, free = np.inf, np.inf, np.zeros(len(codebook), np.float32)
    for _ in range(iterations):
        codes, errors = kernels.nearest(x, w, codebook, free)
        total = float(errors.sum(dtype="float64"))
        means, members = kernels.centroids(x, w, codes, codebook)
        codebook = means.astype(np.float32)
        empty = np.flatnonzero(members == 0)
        worst = _worst(errors, empty.size)
        codebook[empty[: worst.size]] = x[worst]
        if not worst.size and last - total <= tolerance * total:
            break
        last = total
    return codebook, total


def _worst(errors: Floats, count: int) -> NDArray[np.int64]:
    """The points of largest error above zero, at most `count`, the first of equals first."""
    if not count:
        return np.empty(0, np.int64)
    worst = (-errors).argsort(kind="stable")[:count]
    return worst[errors[worst] > 0]


def _array(x: Tensor) -> Floats:
    array: Floats = x.float().contiguous().numpy()
    return array
