"""A method as data: transforms, then steps, each refitting one term to what the others leave.

Recipes are frozen, comparable and printable; `recipes.records` writes and reads them. Nothing
here computes: `fit.backfit` is the one driver that carries a recipe out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from convex_caldera.core.protocols import Coder, Quantizer, RateLimited, Transform
from convex_caldera.errors import RecipeError

# Which part of H a step may see. "mean_abs" is L2QER's statistic, diag(E|x|)^2.
Metric = Literal["identity", "diagonal", "mean_abs", "full"]
METRICS: tuple[Metric, ...] = ("identity", "diagonal", "mean_abs", "full")


@dataclass(frozen=True)
class Quantize:
    """Round the residual with feedback: LDLQ under the metric; nearest where it is diagonal.

    Args:
        quantizer: the reproduction points.
        metric: "full" is LDLQ / GPTQ (QuIP, arXiv 2307.13304); a diagonal one is rounding.
        sweeps: Gauss-Seidel refinement passes after LDLQ (QuIP# "tune").
        downdate: round under H minus what the low-rank term already serves (CALDERA code).
        gains: multiples of the quantizer's own scale to try; the least loss is kept.
        coder: entropy coding of the codes; None stores them at their fixed width.
    """

    quantizer: Quantizer
    metric: Metric = "full"
    sweeps: int = 0
    downdate: bool = False
    gains: tuple[float, ...] = (1.0,)
    coder: Coder | None = None

    def __post_init__(self) -> None:
        _check_metric(self.metric)
        if isinstance(self.quantizer, RateLimited) and self.coder is None:
            raise RecipeError(f"{self.quantizer} needs a coder: its fixed-width codes are wide")
        if self.sweeps < 0 or not self.gains or min(self.gains) <= 0:
            raise RecipeError(f"sweeps must be >= 0 and gains positive, got {self}")


@dataclass(frozen=True)
class FactorCoding:
    """How low-rank factors are coded: LPLR alternation (Saha et al., arXiv 2310.11028).

    `iterations` alternations of exact least squares and rounding; `feedback` rounds with LDLQ
    under each factor's own metric (R under H, L under R H R^T) instead of to the nearest;
    `balanced` splits every singular value evenly between both factors and rotates the
    components, which lowers the coding noise from sum s_i^2 to (sum s_i)^2 / rank.
    """

    quantizer: Quantizer
    iterations: int = 5
    feedback: bool = True
    balanced: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.quantizer, RateLimited):
            raise RecipeError(f"factors have no entropy coder, which {self.quantizer} needs")
        if self.iterations < 1:
            raise RecipeError(f"coded factors need at least one iteration, got {self.iterations}")


@dataclass(frozen=True)
class FitLowRank:
    """Best rank-`rank` term under the metric; factors in float16, or coded."""

    rank: int
    metric: Metric = "full"
    factors: FactorCoding | None = None

    def __post_init__(self) -> None:
        _check_metric(self.metric)
        if self.rank < 0:
            raise RecipeError(f"rank must be >= 0, got {self.rank}")


Step = Quantize | FitLowRank


@dataclass(frozen=True)
class Recipe:
    """`sweeps` rounds over `steps` inside `transforms` (outermost first), best state kept.

    `damping` is the fraction of mean(diag H) added to H for every factorization, and
    `output_damping` the same for the output side of a Kronecker curvature, which is noisier.
    """

    steps: tuple[Step, ...]
    transforms: tuple[Transform, ...] = ()
    sweeps: int = 1
    damping: float = 0.01
    output_damping: float = 0.05

    def __post_init__(self) -> None:
        if not self.steps:
            raise RecipeError("a recipe without steps would return zeros; name at least one step")
        if self.sweeps < 1 or self.damping < 0 or self.output_damping < 0:
            raise RecipeError(f"sweeps must be >= 1 and dampings >= 0, got {self}")

    @property
    def rank(self) -> int:
        return sum(step.rank for step in self.steps if isinstance(step, FitLowRank))


def _check_metric(metric: str) -> None:
    if metric not in METRICS:
        raise RecipeError(f"unknown metric {metric!r}; one of {', '.join(METRICS)}")
