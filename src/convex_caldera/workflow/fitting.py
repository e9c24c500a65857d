"""Fit layers side by side, each on one thread, and remember every result on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from convex_caldera.core.problem import Problem
from convex_caldera.core.recipe import Recipe
from convex_caldera.fit.backfit import Fit, fit_layer
from convex_caldera.models.sites import Site
from convex_caldera.models.skeleton import Skeleton
from convex_caldera.quantizers.search_threads import use_search_threads
from convex_caldera.recipes.records import to_record
from convex_caldera.storage.partial import PartialRun
from convex_caldera.workflow.code_rates import code_rates
from convex_caldera.workflow.curvatures import LAYERS_KEPT, Curvatures
from convex_caldera.workflow.progress import Progress

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Fitter:
    """Carries a recipe out on a layer of a model, under the curvatures gathered for it."""

    skeleton: Skeleton
    curvatures: Curvatures
    seed: int

    def fit(self, site: Site, recipe: Recipe) -> Fit:
        """The compressed layer; a pure function of model, text, recipe and seed."""
        return self.fit_seen(site, recipe, self._problems(site)[1])

    def fit_seen(self, site: Site, recipe: Recipe, seen: Problem) -> Fit:
        """The fit to what rounding sees; losses are those of W under the measured curvature."""
        return fit_layer(
            seen, recipe, seed=self.seed, layer=site.name, site=site.input_site,
            reported=self.problem(site),
        )  # fmt: skip

    def problem(self, site: Site) -> Problem:
        """W of a site under the measured curvature."""
        return self._problems(site)[0]

    @cached_property
    def _problems(self) -> Callable[[Site], tuple[Problem, Problem]]:
        """What losses are of, and what rounding sees; options of one layer come one by one."""

        def make(site: Site) -> tuple[Problem, Problem]:
            W = self.weight(site)
            problem = self.curvatures.problem(site, W)
            return problem, self.curvatures.seen(site, W) if self.curvatures.smooths else problem

        return lru_cache(maxsize=LAYERS_KEPT)(make)

    def weight(self, site: Site) -> Tensor:
        """W (m, n) of a site, float32, where the work is done."""
        return self.skeleton.tensor(f"{site.name}.weight").float().to(self.skeleton.device)

    def record(self, site: Site, recipe: Recipe, fit: Fit) -> dict[str, Any]:
        """One layer's entry in the report."""
        weights = site.shape[0] * site.shape[1]
        return {
            "shape": list(site.shape),
            "input_site": site.input_site,
            "stored_bytes": fit.layer.stored_bytes(),
            "bits": 8 * fit.layer.stored_bytes() / weights,
            **code_rates(fit.layer),
            "rank": fit.layer.rank,
            "loss": fit.loss,
            "relative_loss": fit.relative_loss,
            "ridge": fit.ridge,
            "dead_channels": fit.dead_channels,
            "tokens": self.curvatures.tokens(site),
            "trace": [[step.sweep, step.step, step.relative_loss] for step in fit.trace],
            "recipe": to_record(recipe),
        }


# Of a trial's record: by what its losses were multiplied.
EXPECTED = "expected"


@dataclass(frozen=True)
class Task:
    """One fit: the name it is kept under, its layer and its recipe.

    `primed` is the recipe with what was trained for it beforehand, if anything was. Of a trial the
    losses are kept times `expected`: as those of what it is tried for.
    """

    name: str
    site: Site
    recipe: Recipe
    primed: Recipe | None = None
    expected: float = 1.0


def fit_missing(
    fitter: Fitter,
    tasks: Sequence[Task],
    run: PartialRun,
    stage: str,
    progress: Progress,
    workers: int,
) -> None:
    """Fit and keep every task that the run does not hold yet, `workers` at a time.

    What it holds under a task's name by another recipe is fitted again.
    """
    missing = [task for task in tasks if not _holds(run, task)]
    progress.start(stage, len(missing))

    def work(task: Task) -> Fit:
        return fitter.fit(task.site, task.primed or task.recipe)

    for task, fit in side_by_side(work, missing, workers):
        record = fitter.record(task.site, task.recipe, fit)
        run.put(task.name, fit.layer, _as_expected(record, task.expected))
        progress.advance(task.name)


def _holds(run: PartialRun, task: Task) -> bool:
    """Whether a task's fit is in the run already."""
    return task.name in run.done() and run.record(task.name)["recipe"] == to_record(task.recipe)


def _as_expected(record: dict[str, Any], expected: float) -> dict[str, Any]:
    if expected == 1.0:
        return record
    losses = {key: record[key] * expected for key in ("loss", "relative_loss")}
    return {**record, **losses, EXPECTED: expected}


def loss_as_fitted(record: Mapping[str, Any]) -> float:
    """The loss of the codes that were kept, of a trial's record too."""
    return float(record["loss"]) / float(record.get(EXPECTED, 1.0))


def side_by_side(work: Callable[[T], R], items: Sequence[T], workers: int) -> Iterator[tuple[T, R]]:
    """(item, work(item)) as they finish, `workers` at a time, torch on one thread in each.

    One thread gives the same sums whatever the number of workers; searches, which give the same
    codes on any number, share what torch had. The number is a property of
    the calling thread, but the mathematics library below keeps one for the whole process: the
    caller's is set again at the end, so that what follows does not depend on who finished last.
    After an error or an interruption nothing new is begun.
    """
    before = torch.get_num_threads()

    together = max(1, min(workers, len(items)))

    def alone(item: T) -> R:
        torch.set_num_threads(1)
        use_search_threads(before // together)
        return work(item)

    with ThreadPoolExecutor(together) as pool:
        futures = {pool.submit(alone, item): item for item in items}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            torch.set_num_threads(before)
