"""Allocation among options that differ in kind: every matrix gets the code that suits it.

    measure    every option of a method's menu, layer by layer, with the real quantizer
    decide     one option per layer by its measured loss under the byte budget, with a bound
    store      the options chosen, which were fitted already

No rate model is needed, since nothing is proposed: the menu near the budget's rate is measured
whole. The certificate is that of `allocating`, without a surrogate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from convex_caldera.allocate.curves import Curves
from convex_caldera.core.recipe import Recipe
from convex_caldera.errors import RecipeError
from convex_caldera.recipes.records import canonical_json
from convex_caldera.storage.partial import PartialRun
from convex_caldera.workflow.allocating import Allocator
from convex_caldera.workflow.certifying import certificate_of
from convex_caldera.workflow.curvatures import GRADIENT_KINDS
from convex_caldera.workflow.fitting import Fitter
from convex_caldera.workflow.job import Job
from convex_caldera.workflow.planning import Plan, ties_of, wishes_of
from convex_caldera.workflow.progress import Progress


@dataclass(frozen=True, order=True)
class Offer:
    """One option by its label."""

    label: str
    recipe: Recipe = field(compare=False)


class Menu:
    """The options of all layers of a job near its budget's rate; what `Offers` is elsewhere."""

    def __init__(self, job: Job):
        if job.method.menu is None:
            raise RecipeError(f"{job.method.name} has no menu")
        self.ties = ties_of(job.settings.tie, job.sites)
        weights = sum(site.shape[0] * site.shape[1] for site in job.sites)
        target = 8 * job.budget.compressed_bytes / weights
        self.offers: dict[str, list[Offer]] = {}
        for site in job.sites:
            recipes = job.method.menu(site.shape, wishes_of(job.settings, site.name), target)
            self.offers[site.name] = [Offer(label, recipe) for label, recipe in recipes.items()]

    def recipe(self, name: str, offer: Offer) -> Recipe:
        """The recipe of an option."""
        del name
        return offer.recipe


def allocate_menu(
    job: Job, fitter: Fitter, run: PartialRun, progress: Progress, workers: int
) -> tuple[Plan, dict[str, Any]]:
    """The plan, stored layer by layer, and its certificate.

    Raises:
        RecipeError: the curvature is guided.
        InfeasibleBudgetError: as `allocating`.
    """
    if job.curvature == "guided":
        raise RecipeError(f"{job.method.name} takes no guided curvature; choose kronecker or input")
    menu = Menu(job)
    allocator = MenuAllocator(job, fitter, run, progress, workers, menu)
    with PartialRun(run.folder / "measured", {"options": canonical_json(job.fingerprint())}) as m:
        curves, plan, integer = allocator.decide_all(m, menu.offers)
    certificate = certificate_of(
        job, plan, integer, curves, None, allocator.unit, run, fitter, allocator.scale
    )
    return plan, certificate


class MenuAllocator(Allocator):
    """The measuring, deciding and storing of `Allocator`, over a menu that is given."""

    def __init__(
        self,
        job: Job,
        fitter: Fitter,
        run: PartialRun,
        progress: Progress,
        workers: int,
        menu: Menu,
    ):
        self.job, self.fitter, self.run = job, fitter, run
        self.progress, self.workers = progress, workers
        self.sites = {site.name: site for site in job.sites}
        self.weights = {name: s.shape[0] * s.shape[1] for name, s in self.sites.items()}
        self.unit = "nats" if job.curvature in GRADIENT_KINDS else "relative"
        self.scale = {}
        self.offers = menu  # type: ignore[assignment]

    def decide_all(
        self, measured: PartialRun, offers: Mapping[str, list[Any]]
    ) -> tuple[Curves, Plan, Any]:
        """Measure every option, choose, and store what was chosen."""
        self._measure(measured, offers, "measure")
        curves = self._curves(measured, offers)  # type: ignore[arg-type]
        plan, integer = self._decide(curves, offers)  # type: ignore[arg-type]
        self._store(measured, integer, offers)  # type: ignore[arg-type]
        return curves, plan, integer
