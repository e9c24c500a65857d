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
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

import torch
from torch import Tensor

from convex_caldera.calibrate.curvature import Curvature
from convex_caldera.calibrate.curvature_guided import GuidedCurvature
from convex_caldera.errors import RecipeError
from convex_caldera.linalg.factor import checked_cholesky

CANDIDATES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7)
C = TypeVar("C", Curvature, GuidedCurvature)
# Added to every candidate before factoring: what the fits will add at least.
RIDGE = 1e-3


@dataclass(frozen=True)
class Shrinkage:
    """Weights of both targets, and how each candidate did on unseen sequences.

    Attributes:
        input, output: s of either side, 0 to 1.
        towards: what the input side is drawn to, "identity" or "input" (the second moment of
            the layer's input).
        scores: side -> candidate -> mean over layers of log(expected loss / that at s = 0);
            empty where nothing was searched.

    Raises:
        RecipeError: a share that is not between 0 and 1.
    """

    input: float = 0.0
    output: float = 0.0
    towards: Literal["identity", "input"] = "identity"
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for share in (self.input, self.output):
            _check_share(share)

    def to_dict(self) -> dict[str, object]:
        """Plain values, for reports."""
        return {
            "input": self.input,
            "output": self.output,
            "towards": self.towards,
            "scores": {side: dict(figures) for side, figures in self.scores.items()},
        }


def shrink(matrix: Tensor, share: float, target: Tensor | None = None) -> Tensor:
    """(1 - share) matrix + share (tr matrix / tr target) target; the identity if no target.

    Raises:
        RecipeError: the share is not between 0 and 1.
    """
    _check_share(share)
    if share == 0.0:
        return matrix
    if target is None:
        target = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    trace = float(target.diagonal().sum())
    factor = float(matrix.diagonal().sum()) / trace if trace > 0 else 0.0
    return (1.0 - share) * matrix + (share * factor) * target.to(matrix)


def shrunk(curvature: C, shrinkage: Shrinkage, towards: Tensor | None = None) -> C:
    """A layer's curvature drawn towards its targets; row groups each towards their own."""
    if isinstance(curvature, GuidedCurvature):
        groups = tuple(shrink(H, shrinkage.input, towards) for H in curvature.groups)
        return replace(curvature, groups=groups)
    return replace(
        curvature,
        input=shrink(curvature.input, shrinkage.input, towards),
        output=shrink(curvature.output, shrinkage.output),
    )


def choose_shrinkage(
    seen: Mapping[str, Curvature | GuidedCurvature],
    unseen: Mapping[str, Curvature | GuidedCurvature],
    inputs: Mapping[str, Tensor] | None = None,
    candidates: Sequence[float] = CANDIDATES,
) -> Shrinkage:
    """The shares that cost least on `unseen`, the same layers' curvature on other sequences.

    With `inputs`, second moments by layer, the input side may be drawn to them instead.
    Layers whose gradients vanish on either part say nothing and are left out.

    Cost: two factorizations and one triangular solve of n^3 (and m^3) a layer and candidate.
    """
    alive = [name for name, c in seen.items() if c.energy > 0 and unseen[name].energy > 0]
    plain = [(n, *pair) for n in alive for pair in _inputs_of(seen[n], unseen[n])]
    sides: dict[str, list[tuple[Tensor, Tensor, Tensor | None]]] = {
        "input": [(H, M, None) for _, H, M in plain],
        "output": [(*pair, None) for n in alive for pair in _outputs_of(seen[n], unseen[n])],
    }
    if inputs is not None:
        sides["towards_input"] = [(H, M, inputs[n]) for n, H, M in plain]
    scores = {side: _scores(triples, candidates) for side, triples in sides.items()}
    best = {side: min(figures, key=lambda s: (figures[s], s)) for side, figures in scores.items()}
    side = min((s for s in best if s != "output"), key=lambda s: (scores[s][best[s]], s))
    named = {
        side: {f"{share:g}": figures[share] for share in candidates}
        for side, figures in scores.items()
    }
    towards: Literal["identity", "input"] = "identity" if side == "input" else "input"
    return Shrinkage(best[side], best["output"], towards, named)


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


def _inputs_of(
    seen: Curvature | GuidedCurvature, unseen: Curvature | GuidedCurvature
) -> list[tuple[Tensor, Tensor]]:
    """(measured, unseen) input sides: one of a layer, or one of every row group."""
    if isinstance(seen, GuidedCurvature) and isinstance(unseen, GuidedCurvature):
        pairs = zip(seen.groups, unseen.groups, strict=True)
        return [(H, M) for H, M in pairs if float(H.trace()) > 0 and float(M.trace()) > 0]
    assert isinstance(seen, Curvature) and isinstance(unseen, Curvature)  # of one kind
    return [(seen.input, unseen.input)]


def _outputs_of(
    seen: Curvature | GuidedCurvature, unseen: Curvature | GuidedCurvature
) -> list[tuple[Tensor, Tensor]]:
    both = isinstance(seen, Curvature) and isinstance(unseen, Curvature)
    return [(seen.output, unseen.output)] if both else []


def _check_share(share: float) -> None:
    if not 0.0 <= share <= 1.0:
        raise RecipeError(f"shrinkage lies between 0 and 1, got {share}")
