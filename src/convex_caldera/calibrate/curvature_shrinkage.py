"""Shrinkage of a noisy curvature, chosen on sequences that it has not seen.

A second moment of few sequences is over-fitted: its small eigenvalues are too small, and rounding
pushes its error just there. Both sides are drawn towards something smoother of the same trace,

    H_s = (1 - s) H + s (tr H / tr T) T,     T = I  or  the second moment of the layer's input,
    O_s = (1 - s) O + s I,

and s is the one under which rounding with feedback costs least on unseen sequences. White
rounding noise e makes the error E = P^-T e U^-1 with H_s = U D U^T and O_s = P C P^T, so on
unseen gradients G the expected loss factors into one figure a side,

    E mean_s <E, G_s>^2 = mean_s |P^-1 G_s U^-T|^2,   tr(U^-1 M U^-T) with M = mean_s G_s^T G_s

for the input side alone: no layer is rounded to know it. One s a side serves the whole model:
the sum over layers of the logarithms decides, since single layers are too noisy to.

Source: the aim is that of Ledoit and Wolf (2004); the criterion is this project's own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from convex_caldera.calibrate.curvature import Curvature
from convex_caldera.errors import RecipeError
from convex_caldera.linalg.factor import checked_cholesky

CANDIDATES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7)
# Added to every candidate before factoring: what the fits will add at least.
RIDGE = 1e-3


@dataclass(frozen=True)
class Shrinkage:
    """Weights of both targets, and how each candidate did on unseen sequences.

    Attributes:
        input, output: s of either side, 0 to 1.
        scores: side -> candidate -> mean over layers of log(expected loss / that at s = 0);
            empty where nothing was searched.
    """

    input: float
    output: float
    scores: Mapping[str, Mapping[str, float]]

    def to_dict(self) -> dict[str, object]:
        return {"input": self.input, "output": self.output, "scores": dict(self.scores)}


def shrink(matrix: Tensor, share: float, target: Tensor | None = None) -> Tensor:
    """(1 - share) matrix + share (tr matrix / tr target) target; the identity if no target.

    Raises:
        RecipeError: the share is not between 0 and 1.
    """
    if not 0.0 <= share <= 1.0:
        raise RecipeError(f"shrinkage lies between 0 and 1, got {share}")
    if share == 0.0:
        return matrix
    if target is None:
        target = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    trace = float(target.diagonal().sum())
    factor = float(matrix.diagonal().sum()) / trace if trace > 0 else 0.0
    return (1.0 - share) * matrix + (share * factor) * target.to(matrix)


def shrunk(
    curvatures: Mapping[str, Curvature],
    shrinkage: Shrinkage,
    inputs: Mapping[str, Tensor] | None = None,
) -> dict[str, Curvature]:
    """Every curvature drawn towards its targets; `inputs` are second moments by layer name."""
    return {
        name: replace(
            c,
            input=shrink(c.input, shrinkage.input, None if inputs is None else inputs[name]),
            output=shrink(c.output, shrinkage.output),
        )
        for name, c in curvatures.items()
    }


def choose_shrinkage(
    seen: Mapping[str, Curvature],
    unseen: Mapping[str, Curvature],
    inputs: Mapping[str, Tensor] | None = None,
    candidates: Sequence[float] = CANDIDATES,
) -> Shrinkage:
    """The shares that cost least on `unseen`, the same layers' curvature on other sequences.

    Layers whose gradients vanish on either part say nothing and are left out.

    Cost: two factorizations and one triangular solve of n^3 (and m^3) a layer and candidate.
    """
    alive = [n for n, c in seen.items() if _trace(c.input) > 0 and _trace(unseen[n].input) > 0]
    scores = {
        "input": _scores(
            [
                (seen[n].input, unseen[n].input, None if inputs is None else inputs[n])
                for n in alive
            ],
            candidates,
        ),
        "output": _scores([(seen[n].output, unseen[n].output, None) for n in alive], candidates),
    }
    best = {side: min(figures, key=lambda s: (figures[s], s)) for side, figures in scores.items()}
    named = {
        side: {f"{share:g}": figures[share] for share in candidates}
        for side, figures in scores.items()
    }
    return Shrinkage(best["input"], best["output"], named)


def white_noise_loss(model: Tensor, truth: Tensor) -> float:
    """tr(U^-1 M U^-T) / n for model = U D U^T with unit upper U and M = truth.

    What unit rounding noise with the feedback of `model` costs under `truth`; the least there
    is, over all unit upper U, is reached by model = truth and is the mean of its D.
    """
    n = len(model)
    ridge = RIDGE * float(model.diagonal().mean())
    damped = model.double() + ridge * torch.eye(n, dtype=torch.float64, device=model.device)
    root = checked_cholesky(damped.flip(0, 1), "shrunk curvature").flip(0, 1)
    unit = root / root.diagonal()
    half = torch.linalg.solve_triangular(unit, truth.double(), upper=True)
    whole = torch.linalg.solve_triangular(unit, half.T, upper=True)
    return float(whole.diagonal().sum()) / n


def _scores(
    sides: Sequence[tuple[Tensor, Tensor, Tensor | None]], candidates: Sequence[float]
) -> dict[float, float]:
    """Candidate -> mean log loss over layers, relative to no shrinkage."""

    def losses(share: float) -> list[float]:
        return [white_noise_loss(shrink(H, share, target), truth) for H, truth, target in sides]

    base = losses(0.0)
    return {
        share: sum(math.log(a / b) for a, b in zip(losses(share), base, strict=True))
        / max(len(sides), 1)
        for share in candidates
    }


def _trace(matrix: Tensor) -> float:
    return float(matrix.diagonal().sum())
