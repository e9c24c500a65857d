"""Paired bootstrap: does one model do better than another on the same items?

Two models answer the same n items. What decides is the mean of the differences d_i = a_i - b_i,
whose noise is far below that of either mean, since a hard item is hard for both. Resampling items
(with replacement, inside each part where a task has parts) gives the distribution of the mean
difference; a 95 % interval is its 2.5 and 97.5 percentiles, and the two-sided p-value is twice the
share of resamples on the other side of zero, never below 2 / (resamples + 1).

Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 13 and 16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from convex_caldera.errors import ShapeError

RESAMPLES = 2000
LEVEL = 0.95
# Resampled items at a time, so that memory stays flat (16 MB of indices).
_CHUNK = 2**21


@dataclass(frozen=True)
class PairedDifference:
    """Mean of a - b with its interval and p-value; `significant` if the interval leaves out 0."""

    difference: float
    low: float
    high: float
    p_value: float
    items: int

    @property
    def significant(self) -> bool:
        return self.low > 0 or self.high < 0

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "significant": self.significant}


def paired_bootstrap(
    a: Sequence[float],
    b: Sequence[float],
    parts: Sequence[str] | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> PairedDifference:
    """Compare two models' figures of the same items.

    Args:
        a, b: one figure per item, in one order.
        parts: part of every item; each part counts alike and is resampled by itself.
        resamples: bootstrap samples.
        seed: of the resampling.

    Raises:
        ShapeError: lengths differ or there are no items.
    """
    if not len(a) == len(b) > 0 or (parts is not None and len(parts) != len(a)):
        raise ShapeError(f"paired figures need equal lengths above 0, got {len(a)} and {len(b)}")
    differences = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    labels = np.asarray(parts if parts is not None else [""] * len(differences))
    groups = [differences[labels == label] for label in dict.fromkeys(labels.tolist())]
    random = np.random.default_rng(seed)
    means = np.mean([_resampled_means(g, resamples, random) for g in groups], axis=0)
    observed = float(np.mean([g.mean() for g in groups]))
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    other = min((means <= 0).sum(), (means >= 0).sum())
    p_value = min(1.0, 2 * (int(other) + 1) / (resamples + 1))
    return PairedDifference(observed, float(low), float(high), p_value, len(differences))


def _resampled_means(values: np.ndarray, resamples: int, random: np.random.Generator) -> np.ndarray:
    """Means of `resamples` draws of len(values) items with replacement."""
    if not values.any():
        return np.zeros(resamples)
    rows = max(1, _CHUNK // len(values))
    means = []
    for start in range(0, resamples, rows):
        count = min(rows, resamples - start)
        means.append(values[random.integers(len(values), size=(count, len(values)))].mean(1))
    return np.concatenate(means)
