"""Singular spectra of a layer: the weight, the weight as its inputs see it, and what is left over.

With C C^T = H the weighted error is ||E C||_F^2, so the spectra of W C and of (W - W^) C say what
low rank can still buy: truncating W C at rank r leaves sum_{i > r} sigma_i^2 (docs of
fit/low_rank.py), the least that any factors of that rank can leave.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

MOST_VALUES = 192  # of one spectrum that are written down; the rest lies between its neighbours
DIGITS = 6  # significant; more would be rounding


def layer_spectra(W: Tensor, W_hat: Tensor, H: Tensor) -> dict[str, Any]:
    """A layer's entry in spectra.json.

    Args:
        W, W_hat: (m, n), before and after compression.
        H: (n, n) undamped second moment of the inputs.

    Returns:
        `weight`, `whitened`, `residual`: singular values of W, W C and (W - W_hat) C, largest
        first; `index`: which of them, from 1, all if there are at most MOST_VALUES; `ranks` and
        `loss_left`: the share of tr(W H W^T) that the best factors of each rank leave.

    Cost: three eigenvalue problems of size min(m, n), and a QR of W where m > n.
    """
    W, error, H = W.double(), (W - W_hat).double(), H.double()
    whitened = singular_values(W, H)
    kept = _spaced(len(whitened))
    left = np.concatenate([[0.0], np.cumsum(whitened[::-1] ** 2)])[::-1]
    ranks = np.concatenate([[0], kept])
    total = left[0] if left[0] > 0 else 1.0
    return {
        "index": kept.tolist(),
        "weight": _rounded(singular_values(W, None)[kept - 1]),
        "whitened": _rounded(whitened[kept - 1]),
        "residual": _rounded(singular_values(error, H)[kept - 1]),
        "ranks": ranks.tolist(),
        "loss_left": _rounded(left[ranks] / total),
    }


def singular_values(A: Tensor, H: Tensor | None) -> np.ndarray:
    """Singular values of A C (min(m, n),), C C^T = H, largest first, without a root of H.

    They are roots of eigenvalues: below 1e-8 of the largest they are rounding.
    """
    R = torch.linalg.qr(A).R if A.shape[0] > A.shape[1] else A
    gram = R @ R.T if H is None else R @ H @ R.T
    values = torch.linalg.eigvalsh(0.5 * (gram + gram.T)).flip(0)
    return values.clamp_min(0.0).sqrt().cpu().numpy()


def _spaced(count: int) -> np.ndarray:
    """Indices from 1 to `count`: all, or MOST_VALUES of them, denser at the head."""
    if count <= MOST_VALUES:
        return np.arange(1, count + 1)
    places = np.geomspace(1, count, MOST_VALUES).round().astype(int)
    even = np.linspace(1, count, MOST_VALUES // 2).round().astype(int)
    return np.unique(np.concatenate([places, even]))


def _rounded(values: np.ndarray) -> list[float]:
    return [float(f"{value:.{DIGITS}g}") for value in values]
