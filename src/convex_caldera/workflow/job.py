"""What one run works on, before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from convex_caldera.calibrate.curvature_shrinkage import Shrinkage
from convex_caldera.calibrate.drift import FOLD
from convex_caldera.calibrate.text import fingerprint
from convex_caldera.models.checkpoint import hash_file
from convex_caldera.models.sites import Site
from convex_caldera.models.skeleton import Skeleton
from convex_caldera.recipes.ladder import Method
from convex_caldera.recipes.records import canonical_json
from convex_caldera.storage.source import SourceModel
from convex_caldera.workflow.curvatures import GRADIENT_KINDS, CurvatureKind, GradientOptions
from convex_caldera.workflow.images import ImageSet
from convex_caldera.workflow.planning import Budget
from convex_caldera.workflow.settings import BUDGETS, PATHS, Settings, parse_shrinkage

# Below so many windows the third that is held out is too small to search a shrinkage on.
WINDOWS_TO_SEARCH = 12


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
    images: ImageSet | None = None

    @property
    def diag_hessians(self) -> Path | None:
        """File of the diagonals that layers are fitted under, if that is what the user chose."""
        file = self.settings.diag_hessians
        return None if file is None else Path(file)

    @property
    def curvature(self) -> CurvatureKind:
        """The method's own kind unless the user chose another."""
        if self.diag_hessians is not None:
            return "diagonal"
        chosen = self.settings.curvature
        return self.method.curvature if chosen == "auto" else chosen

    @property
    def targets(self) -> Literal["original", "drift-corrected"]:
        """The method's own, where drift can be measured, unless the user chose others."""
        chosen = self.settings.targets
        if chosen != "auto":
            return chosen
        return self.method.targets if self._sees_drift else "original"

    @property
    def shrinkage(self) -> str:
        """The method's own, where windows enough are held out, unless the user chose another."""
        chosen = self.settings.shrinkage
        if chosen != "auto":
            return chosen
        windows = 0 if self.tokens is None else len(self.tokens)
        searchable = self.curvature in GRADIENT_KINDS and windows >= WINDOWS_TO_SEARCH
        return self.method.shrinkage if searchable else "none"

    @property
    def can_remeasure(self) -> bool:
        """Whether layers are fitted in order under gradients, which can be measured again."""
        return self.curvature in GRADIENT_KINDS and self.targets == "drift-corrected"

    @property
    def measures_options(self) -> bool:
        """Whether layers are fitted in several ways before one of them is chosen."""
        return self.method.allocates or self.method.menu is not None or self.spends

    @property
    def spends(self) -> bool:
        """Whether a uniform plan is filled up by sizes of coded codes, known once they are made."""
        settings, method = self.settings, self.method
        return settings.coder is not None and self.targets == "original" and method.share is None

    @property
    def _sees_drift(self) -> bool:
        """Whether both models can be run side by side: on text alone, and without experts, which

        see a selection of the tokens that differs between the two.
        """
        if self.tokens is None or self.curvature == "none" or len(self.tokens) < FOLD:
            return False
        if self.images is not None:
            return False
        return not any(routed(site) for site in self.sites)

    @property
    def gradient_options(self) -> GradientOptions:
        """How curvature from gradients is treated."""
        shares = parse_shrinkage(self.shrinkage)
        shrinkage = None if shares is None else Shrinkage(*shares)
        return GradientOptions(
            shrinkage, self.settings.curvature_fallback == "input", self.settings.draws
        )

    def fingerprint(self) -> dict[str, str]:
        """What the result depends on; a partial run with another one is refused."""
        return self._fingerprint_without(PATHS)

    def options_fingerprint(self) -> dict[str, str]:
        """What the fit of an option depends on: all but the budget that it is offered under."""
        return self._fingerprint_without(PATHS.union(BUDGETS))

    def _fingerprint_without(self, left_out: frozenset[str]) -> dict[str, str]:
        settings = self.settings.model_dump(exclude=set(left_out))
        return {
            "model": self.skeleton.checkpoint.fingerprint,
            "text": self._data_fingerprint(),
            "recipe": canonical_json(settings),
        }

    def _data_fingerprint(self) -> str:
        """What was calibrated on: text, images too, or a file of diagonals."""
        if self.diag_hessians is not None:
            return f"diagonals {hash_file(self.diag_hessians)}"
        text = "none" if self.tokens is None else fingerprint(self.tokens)
        return text if self.images is None else f"{text}+{self.images.fingerprint}"


def routed(site: Site) -> bool:
    """Whether a layer is one of several experts: its name counts them after the block."""
    return sum(part.isdigit() for part in site.name.split(".")) > 1
