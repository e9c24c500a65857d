"""Operating points: what every way to store a layer costs, measured with the real quantizer.

A candidate is a recipe under a label. Fitted, it is an operating point: bytes and a distortion,
an `Option` of `allocate.curves`. Every fit is kept on disk as it finishes, so a run that is cut
short repeats none of them, and the chosen ones need no second fit.

Source of the term: Shoham and Gersho, "Efficient bit allocation for an arbitrary set of
quantizers", IEEE Trans. ASSP 36 (1988).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from convex_caldera.allocate.curves import Curves, Group, Option
from convex_caldera.core.recipe import Recipe
from convex_caldera.core.terms import CompressedLayer
from convex_caldera.models.embeddings import EmbeddingSite
from convex_caldera.models.sites import Site
from convex_caldera.recipes.records import canonical_json
from convex_caldera.storage.partial import PartialRun
from convex_caldera.workflow.compression import Compression
from convex_caldera.workflow.distortion_unit import DistortionUnit
from convex_caldera.workflow.embedding_scales import measure_scales
from convex_caldera.workflow.fitting import Task, fit_missing
from convex_caldera.workflow.planning import layer_bytes

FOLDER = "measured"


@dataclass(frozen=True)
class Candidate:
    """One way to store a layer; labels are unique within its menu.

    Args:
        label: its name.
        recipe: what the layer is stored by.
        trial: a quicker recipe for codes of the same size, which is measured in its place where
            the layers of the plan are fitted again.
        expected: loss of the recipe over that of the trial, as far as is known beforehand.
    """

    label: str
    recipe: Recipe
    trial: Recipe | None = None
    expected: float = 1.0


Menus = Mapping[str, Sequence[Candidate]]


def measured_on_disk(compression: Compression) -> PartialRun:
    """Where the fits of candidates are kept while a compression is under way, or beyond it.

    Raises:
        ResumeError: the folder holds options of another model, text or setting, or another
            process is at work in it.
    """
    fingerprint = {"options": canonical_json(compression.job.options_fingerprint())}
    return PartialRun(compression.measured or compression.run.folder / FOLDER, fingerprint)


@dataclass(frozen=True)
class OperatingPoints:
    """Candidates as they were fitted.

    Args:
        compression: what the fits are for.
        kept: where they are (`measured_on_disk`).
        unit: of distortions.
    """

    compression: Compression
    kept: PartialRun
    unit: DistortionUnit

    @property
    def sites(self) -> dict[str, Site]:
        return {site.name: site for site in self.compression.job.sites}

    def measure(self, menus: Menus, stage: str) -> None:
        """Fit every candidate that is not there yet, and run the model with those of embeddings."""
        sites = self.sites
        tasks = [
            Task(_key(name, c.label), sites[name], c.trial or c.recipe, expected=c.expected)
            for name, candidates in menus.items()
            for c in candidates
        ]
        c = self.compression
        fit_missing(c.fitter, tasks, self.kept, stage, c.progress, c.workers)
        for site in sites.values():
            if isinstance(site, EmbeddingSite):
                keys = [_key(site.name, candidate.label) for candidate in menus[site.name]]
                measure_scales(c, self.kept, site, keys)

    def record(self, name: str, label: str) -> dict[str, Any]:
        """The report's entry of a candidate that was measured."""
        return self.kept.record(_key(name, label))

    def layer(self, name: str, label: str) -> CompressedLayer:
        """A layer as a candidate stores it."""
        return self.kept.get(_key(name, label))

    def distortion(self, name: str, label: str) -> float:
        """What a candidate costs, in the unit of the plan."""
        return self.unit.of(name, self.record(name, label))

    def curves(self, menus: Menus, ties: tuple[tuple[str, ...], ...]) -> Curves:
        """The operating points of candidates that all were measured, in the order given."""
        sites = self.sites
        return Curves(
            tuple(self._group(sites[name], candidates) for name, candidates in menus.items()), ties
        )

    def store(self, choice: Mapping[str, str]) -> None:
        """Hand the layers of the chosen labels over to the run, as they were fitted."""
        done = self.compression.run.done()
        for name, label in choice.items():
            if name not in done:
                self.compression.run.put(name, self.layer(name, label), self.record(name, label))

    def _group(self, site: Site, candidates: Sequence[Candidate]) -> Group:
        options = tuple(
            Option(
                c.label, 8 * layer_bytes(c.recipe, site.shape), self.distortion(site.name, c.label)
            )
            for c in candidates
        )
        return Group(site.name, math.prod(site.shape), options)


def _key(name: str, label: str) -> str:
    return f"{name} {label}"
