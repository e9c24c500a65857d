"""Weighted nearest codewords and seeding for k-means, compiled for the CPU.

The weighted distance sum_j w_j (x_j - c_j)^2 is summed as it stands, coordinate by coordinate,
64 points at a time: no |x|^2 - 2 x c + |c|^2, whose cancellation would choose the wrong
one of two near codewords. `kmeans.nearest_plain` is the oracle. Kernels release the GIL; callers
own the threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Codes = NDArray[np.int32]

_LANES = 64


@njit(cache=True, nogil=True)
def nearest(x: Any, weights: Any, codebook: Any, bias: Any) -> Any:
    """Codes (N,) and weighted squared distances plus bias (N,) of x (N, d).

    `weights` (P, d) serve point i in row i mod P: P is N, 1, or the blocks of a matrix row;
    `codebook` is (K, d), `bias` (K,) what a codeword costs by itself. Of equally near codewords
    the first is taken. Points go `_LANES` at a time, coordinates first, so that the compiler
    vectorizes over them.
    """
    count, dim = x.shape
    period = weights.shape[0]
    codes = np.empty(count, np.int32)
    errors = np.empty(count, np.float32)
    points = np.zeros((dim, _LANES), np.float32)
    importance = np.zeros((dim, _LANES), np.float32)
    distance = np.empty(_LANES, np.float32)
    least = np.empty(_LANES, np.float32)
    best = np.empty(_LANES, np.int32)
    for start in range(0, count, _LANES):
        lanes = min(_LANES, count - start)
        for lane in range(lanes):
            row = (start + lane) % period
            for j in range(dim):
                points[j, lane] = x[start + lane, j]
                importance[j, lane] = weights[row, j]
        least[:] = np.inf
        best[:] = 0
        for k in range(codebook.shape[0]):
            distance[:] = bias[k]
            for j in range(dim):
                level = codebook[k, j]
                for lane in range(_LANES):
                    gap = points[j, lane] - level
                    distance[lane] += importance[j, lane] * gap * gap
            for lane in range(_LANES):
                nearer = distance[lane] < least[lane]
                best[lane] = k if nearer else best[lane]
                least[lane] = distance[lane] if nearer else least[lane]
        codes[start : start + lanes] = best[:lanes]
        errors[start : start + lanes] = least[:lanes]
    return codes, errors


@njit(cache=True, nogil=True)
def centroids(x: Any, weights: Any, codes: Any, codebook: Any) -> Any:
    """Weighted means of the cells (K, d) in float64, and how many points each has.

    A coordinate without weight in its cell keeps the present codeword's value.
    """
    size, dim = codebook.shape
    sums = np.zeros((size, dim))
    mass = np.zeros((size, dim))
    members = np.zeros(size, np.int64)
    for i in range(x.shape[0]):
        k = codes[i]
        members[k] += 1
        for j in range(dim):
            w = np.float64(weights[i, j])
            sums[k, j] += w * x[i, j]
            mass[k, j] += w
    for k in range(size):
        for j in range(dim):
            sums[k, j] = sums[k, j] / mass[k, j] if mass[k, j] > 0 else codebook[k, j]
    return sums, members


@njit(cache=True, nogil=True)
def seed_codebook(x: Any, weights: Any, draws: Any) -> Any:
    """k-means++: each new codeword a point drawn with probability like its present error.

    `draws` (K,) uniform in [0, 1). When every point already is a codeword, the rest repeat the
    last one. Cost: K N d.
    """
    count, dim = x.shape
    size = draws.shape[0]
    codebook = np.zeros((size, dim), np.float32)
    errors = np.empty(count, np.float64)
    for i in range(count):  # the first by weighted energy about zero would favour outliers
        errors[i] = weights[i].sum()
    for k in range(size):
        total = errors.sum()
        if total <= 0:
            for rest in range(k, size):
                codebook[rest] = codebook[max(k - 1, 0)]
            break
        goal, chosen, reached = draws[k] * total, count - 1, 0.0
        for i in range(count):
            reached += errors[i]
            if reached > goal:
                chosen = i
                break
        codebook[k] = x[chosen]
        for i in range(count):
            error = 0.0
            for j in range(dim):
                gap = np.float64(x[i, j]) - np.float64(codebook[k, j])
                error += weights[i, j] * gap * gap
            errors[i] = error if k == 0 else min(errors[i], error)
    return codebook
