"""Weighted nearest codewords and seeding for k-means, compiled for the CPU.

The weighted distance sum_j w_j (x_j - c_j)^2 is summed as it stands, coordinate by coordinate:
no |x|^2 - 2 x c + |c|^2, whose cancellation would choose the wrong one of two near codewords.
`codebooks.nearest_plain` is the oracle. Kernels release the GIL; callers own the threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Codes = NDArray[np.int32]

_LANES = 64


def nearest(x: Floats, weights: Floats, codebook: Floats, bias: Floats) -> tuple[Codes, Floats]:
    """Codes (N,) and weighted squared distances plus bias (N,) of x (N, d).

    `weights` (P, d) serve point i in row i mod P: P is N, 1, or the blocks of a matrix row;
    `codebook` is (K, d), `bias` (K,) what a codeword costs by itself. Of equally near codewords
    the first is taken. Cost: about a third of a nanosecond a pair in two dimensions.
    """
    axes = (0,) * codebook.shape[1]
    codes, errors = _search(x, weights, codebook, bias, axes)
    return codes, errors


@njit(cache=True, nogil=True)
def _search(x: Any, weights: Any, codebook: Any, bias: Any, axes: Any) -> Any:
    """`nearest`, compiled for every length of blocks: the type of `axes`, a tuple, has it.

    Points go `_LANES` at a time, coordinates first: with the length known, a distance is one
    expression that the compiler vectorizes over points and never writes to memory.
    """
    dim = len(axes)
    count, period = x.shape[0], weights.shape[0]
    codes = np.empty(count, np.int32)
    errors = np.empty(count, np.float32)
    points = np.zeros((dim, _LANES), np.float32)
    importance = np.zeros((dim, _LANES), np.float32)
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
            for lane in range(_LANES):
                distance = bias[k]
                for j in range(dim):
                    gap = points[j, lane] - codebook[k, j]
                    distance += importance[j, lane] * gap * gap
                nearer = distance < least[lane]
                best[lane] = k if nearer else best[lane]
                least[lane] = distance if nearer else least[lane]
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
def normalize(goal: Any, around: Any, scale: Any, block: int, x: Any) -> None:
    """Block `block` of the rows of goal (m, p) over their scales into x (m, d); where 0, zeros.

    `around` (m or 1, p) are scales of columns, `scale` (m or 1,) of the block under them. Columns
    beyond the panel become 0.
    """
    dim = x.shape[1]
    for r in range(goal.shape[0]):
        inner = scale[min(r, scale.shape[0] - 1)]
        outer = around[min(r, around.shape[0] - 1)]
        for j in range(dim):
            i = block * dim + j
            x[r, j] = 0
            if i < goal.shape[1] and outer[i] != 0 and inner != 0:
                x[r, j] = goal[r, i] / outer[i] / inner


@njit(cache=True, nogil=True)
def settle(goal: Any, base: Any, coupling: Any, around: Any, scale: Any, table: Any, codes: Any,
           block: int, values: Any) -> None:  # fmt: skip
    """Values of a block's codes, and their errors into what is left of the goal.

    values = codeword * scale * around,   goal_k += sum_i (base_i - values_i) coupling_ik   (k > i)

    over the columns i of the block and k behind it.
    """
    dim, width = table.shape[1], goal.shape[1]
    start, end = block * dim, min(block * dim + dim, width)
    for r in range(goal.shape[0]):
        inner = scale[min(r, scale.shape[0] - 1)]
        outer = around[min(r, around.shape[0] - 1)]
        for i in range(start, end):
            values[r, i] = table[codes[r, block], i - start] * inner * outer[i]
            error = base[r, i] - values[r, i]
            for k in range(end, width):
                goal[r, k] += error * coupling[i, k]


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
