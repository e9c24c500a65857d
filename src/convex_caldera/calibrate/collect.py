"""Statistics of every linear input, one decoder block in memory at a time.

Each block is loaded once: its inputs are measured, it is handed to the caller with its weights,
and it is freed. What the next block sees is either the output of the original block or, for
sequential compression, of the block after the caller changed its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from convex_caldera.calibrate.statistics import InputAccumulator, InputStatistics
from convex_caldera.core.hessian import Hessian
from convex_caldera.errors import RecipeError
from convex_caldera.models.blocks import HiddenStates
from convex_caldera.models.intercept import first_input
from convex_caldera.models.sites import Site
from convex_caldera.models.skeleton import Skeleton

Propagate = Literal["original", "compressed"]
# (block index, block) -> None: puts compressed weights into the block, in place.
Replace = Callable[[int, nn.Module], None]
# (block index, batch index, batches in all) after every batch.
Progress = Callable[[int, int, int], None]


@dataclass(frozen=True, eq=False)
class CalibratedBlock:
    """One decoder block with its weights, as long as the caller holds the loop on it.

    Attributes:
        index: of the block.
        name: of the block, as `model.layers.0`.
        module: the block with real weights; not to be used after the loop has moved on.
        sites: its linear layers.
        inputs: statistics by input site.
    """

    index: int
    name: str
    module: nn.Module
    sites: tuple[Site, ...]
    inputs: dict[str, InputStatistics]

    def linear(self, site: Site) -> nn.Linear:
        """The torch layer of a site."""
        return self.module.get_submodule(site.name.removeprefix(f"{self.name}."))  # type: ignore[return-value]

    def weight(self, site: Site) -> Tensor:
        """W (m, n) of a site, a copy that outlives the block."""
        return self.linear(site).weight.detach().clone()

    def hessians(self, damping: float = 0.01) -> dict[str, Hessian]:
        """One Hessian per input site, to be shared by the layers that read it."""
        return {name: statistics.hessian(damping) for name, statistics in self.inputs.items()}


def collect(
    model: Skeleton | Path,
    tokens: Tensor,
    *,
    batch_size: int = 2,
    store: torch.dtype = torch.float32,
    propagate: Propagate = "original",
    replace: Replace | None = None,
    only: Collection[int] | None = None,
    progress: Progress | None = None,
) -> Iterator[CalibratedBlock]:
    """Go through the decoder, yielding every block with its weights and input statistics.

    Args:
        model: a skeleton or a model directory.
        tokens: (samples, length) token ids.
        batch_size: samples per forward.
        store: type in which hidden states wait between blocks.
        propagate: "original" hands the outputs of the original blocks on. "compressed" calls
            `replace` when the caller comes back for the next block, then runs the changed
            block, so that later statistics are those of the compressed model.
        replace: required for "compressed", refused otherwise; also called for blocks that are
            not in `only`, but not for the last block.
        only: indices of blocks to measure and yield; others are passed through, and nothing
            runs after the last one. Default: all.
        progress: called after every batch.

    Raises:
        NumericalError: NaN or infinite weights or activations, naming module and sample.
        DataError: tokens beyond the vocabulary, or none that reached some layer.
        RecipeError: `replace` and `propagate` contradict each other; an unknown block.

    Cost: one forward of the model, two with "compressed"; 2 n^2 flop per token and input of
    width n. Memory: hidden states, one block, its inputs' n^2 float64.
    """
    skeleton = model if isinstance(model, Skeleton) else Skeleton(model)
    total = len(skeleton.structure.blocks)
    wanted = set(range(total)) if only is None else set(only)
    _check_choices(propagate, replace, wanted, total)
    return _collect(skeleton, tokens, batch_size, store, replace, wanted, progress)


def _collect(
    skeleton: Skeleton,
    tokens: Tensor,
    batch_size: int,
    store: torch.dtype,
    replace: Replace | None,
    wanted: set[int],
    progress: Progress | None,
) -> Iterator[CalibratedBlock]:
    if not wanted:
        return
    states = HiddenStates(skeleton, tokens, batch_size, store)
    for index in range(max(wanted) + 1):
        name = skeleton.structure.block_name(index)
        with skeleton.loaded(name) as block:
            if index in wanted:
                inputs = _measure(states, index, block, replace is None, progress)
                sites = skeleton.structure.sites_of(index)
                yield CalibratedBlock(index, name, block, sites, inputs)
            elif replace is None:
                states.advance(index, block)
            if replace is not None and index < max(wanted):
                replace(index, block)
                states.advance(index, block)


def _measure(
    states: HiddenStates, index: int, block: nn.Module, keep: bool, progress: Progress | None
) -> dict[str, InputStatistics]:
    """Run a block over all batches with its inputs watched; `keep` keeps the outputs too."""
    structure = states.skeleton.structure
    meters = {
        site.name: Meter(InputAccumulator(site.name, site.shape[1], states.skeleton.device))
        for site in structure.sites_of(index)
        if site.name == site.input_site
    }
    handles = [
        block.get_submodule(
            name.removeprefix(f"{structure.block_name(index)}.")
        ).register_forward_pre_hook(meter, with_kwargs=True)
        for name, meter in meters.items()
    ]
    try:
        for batch in range(len(states)):
            for meter in meters.values():
                meter.samples = states.samples(batch)
            output = states.output(index, block, batch)
            if keep:
                states.put(batch, output)
            if progress is not None:
                progress(index, batch, len(states))
    finally:
        for handle in handles:
            handle.remove()
    return {name: meter.accumulator.finish() for name, meter in meters.items()}


class Meter:
    """A forward pre-hook that adds what a layer reads to an accumulator."""

    def __init__(self, accumulator: InputAccumulator):
        self.accumulator = accumulator
        self.samples = range(0)

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.accumulator.add(first_input(args, kwargs), self.samples)


def _check_choices(propagate: str, replace: Replace | None, wanted: set[int], total: int) -> None:
    if propagate not in get_args(Propagate):
        raise RecipeError(f"propagate must be one of {get_args(Propagate)}, got {propagate!r}")
    if (propagate == "compressed") != (replace is not None):
        raise RecipeError("`replace` goes with propagate='compressed', and only with it")
    unknown = sorted(wanted - set(range(total)))
    if unknown:
        raise RecipeError(f"there is no block {unknown[0]}; the model has {total}")
