"""A mean over tokens and its standard error, with windows as clusters.

Tokens of one window share a topic and a context, so their losses are correlated and sqrt(n)
over tokens would promise too much. With S_w the sum and n_w the count of window w, the mean
is m = sum S_w / sum n_w, and linearizing this ratio gives

    se(m)^2 = C / (C - 1) * sum_w (S_w - m n_w)^2 / (sum n_w)^2      over C windows

(the ratio estimator of cluster sampling; Cochran, Sampling Techniques, chapter 6). Windows
count as independent, which neighbors in one document are not quite.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error; None where one window says nothing about spread."""

    mean: float
    stderr: float | None


def clustered_mean(totals: Tensor, counts: Tensor) -> Estimate:
    """Mean per token from the sums (C,) and token counts (C,) of C windows, in float64."""
    totals, counts = totals.double(), counts.double()
    mean = totals.sum() / counts.sum()
    clusters = len(totals)
    if clusters < 2:
        return Estimate(mean.item(), None)
    spread = (totals - mean * counts).square().sum() * clusters / (clusters - 1)
    return Estimate(mean.item(), (spread.sqrt() / counts.sum()).item())
