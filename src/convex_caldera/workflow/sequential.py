"""Blocks compressed in order, each towards what makes up for those before it.

Original and compressed model run side by side, one block at a time. Within a block, layers that
read the same input are fitted together, first readers first, so that a layer's target knows of
everything that was compressed before it (`calibrate.drift`). What was stored is read back, so
that a resumed run sees the same blocks and ends with the same bytes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from convex_caldera.calibrate.drift import Blend, DriftAccumulator, drift_target
from convex_caldera.core.problem import Problem
from convex_caldera.core.recipe import Recipe
from convex_caldera.errors import RecipeError
from convex_caldera.models.blocks import HiddenStates
from convex_caldera.models.intercept import first_input
from convex_caldera.models.sites import Site
from convex_caldera.storage.partial import PartialRun
from convex_caldera.workflow.fitting import Fitter, side_by_side
from convex_caldera.workflow.job import Job
from convex_caldera.workflow.progress import Progress


def in_order(job: Job, fitter: Fitter, recipes: Mapping[str, Recipe], workers: int) -> InOrder:
    """The layers of a job, block after block.

    Raises:
        RecipeError: the job has no calibration text.
    """
    if job.tokens is None:
        raise RecipeError("drift-corrected targets need calibration text")
    return InOrder(fitter, job.tokens, recipes, job.curvature == "input", workers)


@dataclass(frozen=True)
class InOrder:
    """Fits the layers of a plan block after block.

    Args:
        fitter: the model, its curvatures and the seed.
        tokens: calibration windows (samples, length).
        recipes: of every layer to compress.
        by_inputs: rounding sees the second moment of the compressed model's own inputs, where
            the curvature is that of inputs; otherwise the curvature as it was measured.
        workers: layers fitted at a time; does not change the result.
    """

    fitter: Fitter
    tokens: Tensor
    recipes: Mapping[str, Recipe]
    by_inputs: bool
    workers: int

    def run(self, run: PartialRun, progress: Progress) -> None:
        """Fit and store every layer that is not in the run yet.

        Raises:
            DataError, NumericalError, ShapeError: as `calibrate.drift`.

        Cost: beside the fits, a forward pass of both models for every input of a block and one
        more. Memory: two blocks, and the hidden states of all samples twice.
        """
        skeleton = self.fitter.skeleton
        progress.start("layers", len(self.recipes) - len(run.done() & set(self.recipes)))
        original = HiddenStates(skeleton, self.tokens)
        compressed = HiddenStates(skeleton, self.tokens)
        total = len(skeleton.structure.blocks)
        for index in range(total):
            name = skeleton.structure.block_name(index)
            with skeleton.loaded(name) as block:
                changed = copy.deepcopy(block)
                for sites in self._groups(index):
                    if not all(site.name in run.done() for site in sites):
                        drift = _drift(sites[0], (original, block), (compressed, changed), name)
                        self._fit(sites, drift, run, progress)
                    for site in sites:
                        _put(changed, site, name, run.get(site.name).decode())
                if index + 1 < total:
                    original.advance(index, block)
                    compressed.advance(index, changed)

    def _groups(self, index: int) -> list[list[Site]]:
        """Layers of a block to compress, by input, in the order of the first reader."""
        groups: dict[str, list[Site]] = {}
        for site in self.fitter.skeleton.structure.sites_of(index):
            if site.name in self.recipes:
                groups.setdefault(site.input_site, []).append(site)
        return list(groups.values())

    def _fit(
        self, sites: list[Site], drift: DriftAccumulator, run: PartialRun, progress: Progress
    ) -> None:
        hessian = drift.inputs.finish().hessian() if self.by_inputs else None

        def work(site: Site) -> tuple[Any, Blend]:
            W = self.fitter.weight(site)
            target, blend = drift_target(W, drift)
            seen = self.fitter.curvatures.seen(site, target)
            if hessian is not None:
                seen = Problem(target, hessian, site.name)
            return self.fitter.fit_seen(site, self.recipes[site.name], W, seen), blend

        missing = [site for site in sites if site.name not in run.done()]
        for site, (fit, blend) in side_by_side(work, missing, self.workers):
            record = self.fitter.record(site, self.recipes[site.name], fit)
            run.put(site.name, fit.layer, {**record, "drift": asdict(blend)})
            progress.advance(site.name)


Side = tuple[HiddenStates, nn.Module]


def _drift(site: Site, original: Side, compressed: Side, block: str) -> DriftAccumulator:
    """Moments of what a site reads in both models; nothing but the site's input is kept."""
    drift = DriftAccumulator(site.input_site, site.shape[1], original[0].skeleton.device)
    for batch in range(len(original[0])):
        read = [_input_of(site, side, block, batch) for side in (original, compressed)]
        drift.add(read[0], read[1], original[0].samples(batch))
    return drift


def _input_of(site: Site, side: Side, block: str, batch: int) -> Tensor:
    states, module = side
    read: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        read.append(first_input(args, kwargs).detach())

    linear = module.get_submodule(site.name.removeprefix(f"{block}."))
    handle = linear.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        states.output(site.block, module, batch)
    finally:
        handle.remove()
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in read])


def _put(module: nn.Module, site: Site, block: str, W: Tensor) -> None:
    linear: Any = module.get_submodule(site.name.removeprefix(f"{block}."))
    with torch.no_grad():
        linear.weight.copy_(W)
