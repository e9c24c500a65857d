"""Targets that make up for what compressed blocks before a layer have done to its input.

The original layer would have written W x_f; the compressed model offers x_q in place of x_f.
Over tokens, the matrix that comes nearest is

    argmin_X E |W x_f - X x_q|^2 = W H_fq H_qq^-1,    H_fq = E[x_f x_q^T],  H_qq = E[x_q x_q^T],

and what is rounded is a blend, W' = W + beta Delta with

    Delta = W (H_fq - H_qq) (H_qq + ridge I)^-1 ,

zero where nothing has drifted. Ridge and beta are searched on samples that Delta has not seen,
where the loss is a parabola in beta with its least value at

    beta = tr(W (F - Q) Delta^T) / tr(Delta Q Delta^T) ,    F, Q = H_fq, H_qq of those samples,

held within 0 and 1; the Delta that is used then comes from all samples.

Source: asymmetric calibration of GPTAQ and Qronos; the searched blend of WaterSIC, arXiv
2603.04956. Differs: the search is one line for each ridge instead of runs of the model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from convex_caldera.calibrate.statistics import InputStatistics, pack_symmetric
from convex_caldera.errors import DataError, NumericalError, ShapeError
from convex_caldera.linalg.finite import all_finite

# Of every so many samples one is kept for the search.
FOLD = 3
# Ridges to try, as fractions of the mean diagonal of H_qq.
RIDGES = (0.01, 0.1, 1.0)


@dataclass(frozen=True)
class Blend:
    """What was found: beta, the ridge, and by how much unseen drift falls.

    Attributes:
        factor: beta, 0 (the original weight) to 1.
        ridge: as a fraction of the mean diagonal of H_qq.
        drift: E |W x_f - W x_q|^2 / E |W x_f|^2 on the unseen samples.
        left: the same with W' in place of W; at most `drift`.
    """

    factor: float
    ridge: float
    drift: float
    left: float


@dataclass(frozen=True, eq=False)
class Moments:
    """Means over tokens: H_ff (of the samples to search on alone), H_fq and H_qq (n, n)."""

    original: Tensor
    crossed: Tensor
    compressed: Tensor


class DriftAccumulator:
    """Moments of one input site as both models see it, samples for the search kept apart.

    Memory: six n^2 float64. Cost: about 5 n^2 flop a token.
    """

    def __init__(self, name: str, width: int, device: torch.device | str = "cpu"):
        self.name = name
        self._absolute = torch.zeros(width, dtype=torch.float64, device=device)
        shape = (2, 3, width, width)
        self._sums = torch.zeros(shape, dtype=torch.float64, device=device)
        self._tokens = [0, 0]

    def add(self, original: Tensor, compressed: Tensor, samples: range) -> None:
        """Add what both models give the site on the same samples, (..., n) in equal order.

        Raises:
            ShapeError: both saw different tokens, or samples cannot be told apart.
            NumericalError: NaN or infinite values.
        """
        if original.shape != compressed.shape:
            raise ShapeError(
                f"{self.name}: {tuple(original.shape)} from the original model but "
                f"{tuple(compressed.shape)} from the compressed one"
            )
        width = original.shape[-1]
        if original.numel() // width % len(samples):
            raise ShapeError(
                f"{self.name}: sees a selection of the tokens (experts), so that samples cannot be "
                "told apart; use --targets original"
            )
        pairs = (
            t.detach().float().reshape(len(samples), -1, width) for t in (original, compressed)
        )
        for sample, f, q in zip(samples, *pairs, strict=True):
            part = int(sample % FOLD == FOLD - 1)
            if part:  # only the search needs H_ff
                self._sums[part, 0] += f.T @ f
            self._sums[part, 1] += f.T @ q
            self._sums[part, 2] += q.T @ q
            self._absolute += q.abs().sum(0, dtype=torch.float64)
            self._tokens[part] += len(f)
        if not all_finite(self._sums.diagonal(dim1=-2, dim2=-1)):
            raise NumericalError(
                f"{self.name}: inputs of the compressed model are NaN or infinite in samples "
                f"{samples.start} to {samples.stop - 1}; use --targets original"
            )

    def finish(self) -> tuple[Moments, Moments]:
        """Moments of the samples to fit on, and of those to search on.

        Raises:
            DataError: one of both is empty; more windows are needed.
        """
        if not all(self._tokens):
            raise DataError(
                f"drift-corrected targets need at least {FOLD} calibration windows, one of them "
                "to search the blend on; raise --nsamples"
            )
        fit, search = (
            Moments(*(sums / tokens)) for sums, tokens in zip(self._sums, self._tokens, strict=True)
        )
        return fit, search

    def inputs(self) -> InputStatistics:
        """Statistics of what the compressed model offers, all samples."""
        count = sum(self._tokens)
        moment = self.all_samples().compressed.float().cpu()
        return InputStatistics(
            self.name, pack_symmetric(moment), (self._absolute / count).float().cpu(), count
        )

    def all_samples(self) -> Moments:
        """H_fq and H_qq of all samples together."""
        return Moments(*(self._sums.sum(0) / sum(self._tokens)))


def drift_target(W: Tensor, drift: DriftAccumulator) -> tuple[Tensor, Blend]:
    """W' (m, n) in the dtype of W, and what the search found.

    Cost: a solve of n^3 and four m n^2 products a ridge.
    """
    fit, search = drift.finish()
    exact = W.double()
    energy = _quadratic(exact, search.original)
    crossed = float(((exact @ search.crossed) * exact).sum())
    before = energy - 2 * crossed + _quadratic(exact, search.compressed)
    best = Blend(0.0, RIDGES[0], 0.0, 0.0), before
    for ridge in RIDGES:
        delta = correction(exact, fit, ridge)
        slope = float((exact @ (search.crossed - search.compressed) * delta).sum())
        curve = _quadratic(delta, search.compressed)
        factor = min(max(slope / curve, 0.0), 1.0) if curve > 0 else 0.0
        after = before - 2 * factor * slope + factor * factor * curve
        if after < best[1]:
            best = Blend(factor, ridge, 0.0, 0.0), after
    found, after = best
    share = energy if energy > 0 else 1.0
    blend = Blend(found.factor, found.ridge, before / share, after / share)
    if found.factor == 0.0:
        return W, blend
    target = exact + found.factor * correction(exact, drift.all_samples(), found.ridge)
    return target.to(W.dtype), blend


def correction(W: Tensor, moments: Moments, ridge: float) -> Tensor:
    """Delta = W (H_fq - H_qq) (H_qq + ridge mean(diag H_qq) I)^-1, float64."""
    Q = moments.compressed
    mean = float(Q.diagonal().mean())
    level = ridge * mean if mean > 0 else 1.0
    damped = Q + level * torch.eye(len(Q), dtype=Q.dtype, device=Q.device)
    moved = W.double() @ (moments.crossed - Q)
    return torch.cholesky_solve(moved.T, torch.linalg.cholesky(damped)).T


def _quadratic(A: Tensor, H: Tensor) -> float:
    """tr(A H A^T)."""
    return float(((A @ H) * A).sum())
