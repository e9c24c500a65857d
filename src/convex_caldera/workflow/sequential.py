"""Blocks compressed in order, each towards what makes up for those before it.

Original and compressed model run side by side, one block at a time. Within a block, layers that
read the same input are fitted together, first readers first, so that a layer's target knows of
everything that was compressed before it (`calibrate.drift`), embeddings included. What was stored
is read back, so that a resumed run sees the same blocks and ends with the same bytes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from convex_caldera.calibrate.drift import FOLD, Blend, DriftAccumulator, drift_target
from convex_caldera.core.problem import Problem
from convex_caldera.core.recipe import Recipe
from convex_caldera.errors import RecipeError, ShapeError
from convex_caldera.models.blocks import HiddenStates
from convex_caldera.models.intercept import ForwardStoppedError, first_input
from convex_caldera.models.sites import Site
from convex_caldera.storage.partial import PartialRun
from convex_caldera.workflow.compression import Compression
from convex_caldera.workflow.fitting import Fitter, side_by_side
from convex_caldera.workflow.progress import Progress

# Tokens that moments are taken over: this many, or so many for each column of the widest input.
LEAST_TOKENS, TOKENS_PER_COLUMN = 16_384, 16


def fit_in_order(compression: Compression, recipes: Mapping[str, Recipe]) -> None:
    """Fit and store the layers of a plan, block after block.

    Raises:
        RecipeError: the job has no calibration text.
        DataError, NumericalError, ShapeError: as `InOrder.run`.
    """
    job = compression.job
    if job.tokens is None:
        raise RecipeError("drift-corrected targets need calibration text")
    by_inputs = job.curvature == "input"
    InOrder(compression.fitter, job.tokens, recipes, by_inputs, compression.workers).run(
        compression.run, compression.progress
    )


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

        Cost: beside the fits, one forward pass of the original and about three of the compressed
        model. Memory: two blocks, and the hidden states and block inputs of the windows used.
        """
        skeleton = self.fitter.skeleton
        progress.start("layers", len(self.recipes) - len(run.done() & set(self.recipes)))
        tokens = windows_used(self.tokens, max(s.shape[1] for s in skeleton.sites))
        original = HiddenStates(skeleton, tokens)
        with skeleton.substituted(self._embeddings(run)):
            compressed = HiddenStates(skeleton, tokens)
        total = len(skeleton.structure.blocks)
        for index in range(total):
            name = skeleton.structure.block_name(index)
            groups = self._groups(index)
            with skeleton.loaded(name) as block:
                changed = copy.deepcopy(block)
                reads = _advance_reading(original, index, block, [g[0] for g in groups], name)
                for sites in groups:
                    read = reads.pop(sites[0].name)
                    if not all(site.name in run.done() for site in sites):
                        drift = _drift(sites[0], read, compressed, changed, name)
                        self._fit(sites, drift, run, progress)
                    for site in sites:
                        _put(changed, site, name, run.get(site.name).decode())
                if index + 1 < total:
                    compressed.advance(index, changed)

    def _embeddings(self, run: PartialRun) -> dict[str, Tensor]:
        """Parameters of compressed embeddings, which the run holds already -> decoded weights."""
        skeleton = self.fitter.skeleton
        if set(self.recipes) <= {site.name for site in skeleton.sites}:
            return {}
        sites = [site for site in skeleton.embeddings if site.name in self.recipes]
        return {f"{site.parameter}.weight": run.get(site.name).decode() for site in sites}

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
        hessian = drift.inputs().hessian() if self.by_inputs else None

        def work(site: Site) -> tuple[Any, Blend]:
            W = self.fitter.weight(site)
            target, blend = drift_target(W, drift)
            seen = self.fitter.curvatures.seen(site, target)
            if hessian is not None:
                seen = Problem(target, hessian, site.name)
            return self.fitter.fit_seen(site, self.recipes[site.name], seen), blend

        missing = [site for site in sites if site.name not in run.done()]
        for site, (fit, blend) in side_by_side(work, missing, self.workers):
            record = self.fitter.record(site, self.recipes[site.name], fit)
            run.put(site.name, fit.layer, {**record, "drift": asdict(blend)})
            progress.advance(site.name)


def windows_used(tokens: Tensor, widest: int) -> Tensor:
    """The first windows, enough for the moments of the widest input."""
    return tokens[: windows_wanted(tokens.shape[1], widest)]


def windows_wanted(length: int, widest: int) -> int:
    """Windows of `length` tokens that moments of an input of width `widest` are taken over."""
    wanted = max(LEAST_TOKENS, TOKENS_PER_COLUMN * widest)
    return max(-(-wanted // length), FOLD)


def _advance_reading(
    states: HiddenStates, index: int, block: nn.Module, sites: list[Site], name: str
) -> dict[str, list[Tensor]]:
    """Run the original block on all batches; what the sites read, a list over batches each."""
    reads: dict[str, list[Tensor]] = {site.name: [] for site in sites}
    for batch in range(len(states)):
        with _reading(block, sites, name) as found:
            hidden = states.output(index, block, batch)
        for site in sites:
            reads[site.name].append(_whole(found[site.name], site))
        states.put(batch, hidden)
    return reads


def _drift(
    site: Site, read: list[Tensor], states: HiddenStates, block: nn.Module, name: str
) -> DriftAccumulator:
    """Moments of what a site reads in both models; the changed block runs up to the site."""
    drift = DriftAccumulator(site.input_site, site.shape[1], states.skeleton.device)
    for batch in range(len(states)):
        with _reading(block, [site], name, stop=True) as found, suppress(ForwardStoppedError):
            states.output(site.block, block, batch)
        drift.add(read[batch], _whole(found[site.name], site), states.samples(batch))
    return drift


@contextmanager
def _reading(
    block: nn.Module, sites: list[Site], name: str, stop: bool = False
) -> Iterator[dict[str, list[Tensor]]]:
    """What sites of a block read meanwhile; with `stop` the forward ends at the first read."""
    found: dict[str, list[Tensor]] = {site.name: [] for site in sites}

    def hook_of(site: Site) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found[site.name].append(first_input(args, kwargs).detach())
            if stop:
                raise ForwardStoppedError

        return hook

    handles = [
        block.get_submodule(site.name.removeprefix(f"{name}.")).register_forward_pre_hook(
            hook_of(site), with_kwargs=True
        )
        for site in sites
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _whole(found: list[Tensor], site: Site) -> Tensor:
    """The first read of a site in a forward, (tokens, n)."""
    if not found:
        raise ShapeError(
            f"{site.name}: sees a selection of the tokens (experts), and none of some windows; "
            "use --targets original"
        )
    return found[0].reshape(-1, found[0].shape[-1])


def _put(module: nn.Module, site: Site, block: str, W: Tensor) -> None:
    linear: Any = module.get_submodule(site.name.removeprefix(f"{block}."))
    with torch.no_grad():
        linear.weight.copy_(W)
