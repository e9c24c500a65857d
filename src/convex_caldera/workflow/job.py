"""What one run works on, before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from convex_caldera.calibrate.curvature_shrinkage import Shrinkage
from convex_caldera.calibrate.text import fingerprint
from convex_caldera.models.sites import Site
from convex_caldera.models.skeleton import Skeleton
from convex_caldera.recipes.ladder import Method
from convex_caldera.recipes.records import canonical_json
from convex_caldera.storage.source import SourceModel
from convex_caldera.workflow.curvatures import CurvatureKind, GradientOptions
from convex_caldera.workflow.planning import Budget
from convex_caldera.workflow.settings import Settings, parse_shrinkage


@dataclass(frozen=True)
class Job:
    """What one run works on, before anything is computed."""

    settings: Settings
    method: Method
    skeleton: Skeleton
    source: SourceModel
    sites: tuple[Site, ...]
    budget: Budget
    tokens: Tensor | None

    @property
    def curvature(self) -> CurvatureKind:
        """The method's own kind unless the user chose another."""
        chosen = self.settings.curvature
        return self.method.curvature if chosen == "auto" else chosen

    @property
    def gradient_options(self) -> GradientOptions:
        """How curvature from gradients is treated."""
        shares = parse_shrinkage(self.settings.shrinkage)
        shrinkage = None if shares is None else Shrinkage(*shares)
        return GradientOptions(shrinkage, self.settings.curvature_fallback == "input")

    def fingerprint(self) -> dict[str, str]:
        """What the result depends on; a partial run with another one is refused."""
        settings = self.settings.model_dump(exclude={"model", "dataset"})
        return {
            "model": self.skeleton.checkpoint.fingerprint,
            "text": "none" if self.tokens is None else fingerprint(self.tokens),
            "recipe": canonical_json(settings),
        }
