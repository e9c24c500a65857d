"""Block-wise tuning: every block learns to give what the original's block gives.

    minimise || block^(x^) - block(x) ||^2,    x^_(i+1) = block^_i(x^_i),   x_(i+1) = block_i(x_i)

x are the hidden states of the original and x^ those of the compressed model as tuned so far, so a
block also makes up for what the blocks before it have left. One block is in memory at a time,
beside the hidden states of all windows, twice.

Source: QuIP#, arXiv 2402.04396; AQLM, arXiv 2401.06118; ReALLM, arXiv 2405.13155. Differs: ReALLM's
targets are the original block on the inputs of the compressed model, so that errors of earlier
blocks stay; QuIP# trains layer after layer with the others not yet compressed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from convex_caldera.finetune.journal import Journal
from convex_caldera.finetune.losses import divergence, mixed_precision, relative_error
from convex_caldera.finetune.parts import Wish
from convex_caldera.finetune.place import Trained, Values, norm_weights, replace_layers
from convex_caldera.finetune.schedule import Schedule
from convex_caldera.finetune.stored import StoredModel, with_values
from convex_caldera.finetune.team import Team
from convex_caldera.finetune.training import Meter, Outcome, train
from convex_caldera.finetune.windows import TrainingText
from convex_caldera.models.blocks import HiddenStates, iterate_blocks
from convex_caldera.models.skeleton import Skeleton


@dataclass(frozen=True)
class BlockResult:
    """What block-wise tuning found: values by full name, outcomes by block, KL on validation."""

    values: Values
    outcomes: tuple[Outcome, ...]
    divergence_before: float
    divergence_after: float


class BlockObjective:
    """Relative error of one block's output; an `Objective`."""

    def __init__(
        self,
        index: int,
        block: nn.Module,
        trained: Trained,
        states: HiddenStates,
        targets: HiddenStates,
        text: TrainingText,
    ):
        self.name = f"block {index}"
        self.trained = trained
        self.batches = len(text.training)
        self._index, self._block, self._text = index, block, text
        self._states, self._targets = states, targets

    def loss(self, batch: int) -> Tensor:
        """||block^(x^) - block(x)||^2 / ||block(x)||^2 of one batch."""
        with mixed_precision(self._states.skeleton.device):
            output = self._states.call(self._index, self._block, batch)
        return relative_error(output, self._targets.hidden(batch))

    def validation(self) -> float:
        """The same, mean over the validation batches."""
        losses = [float(self.loss(batch)) for batch in self._text.validation]
        return sum(losses) / len(losses)


def tune_blocks(
    skeleton: Skeleton,
    stored: StoredModel,
    wish: Wish,
    schedule: Schedule,
    text: TrainingText,
    *,
    folder: Path | None = None,
    journal: Journal | None = None,
    meter: Meter | None = None,
    team: Team | None = None,
    seed: int = 0,
    cached: bool = True,
) -> BlockResult:
    """Tune every block in turn; see the module.

    Args:
        skeleton: the original model.
        stored: the compressed model.
        wish: what is trained.
        schedule: of each block; a time budget is divided among the blocks.
        text: windows and their split.
        folder: where states are kept for resuming.
        seed: of new components.
        cached: see `TunableLinear`.

    Memory: two blocks, and two float32 hidden states a token.
    """
    count = len(skeleton.structure.blocks)
    share = None if schedule.seconds is None else schedule.seconds / count
    schedule = replace(schedule, seconds=share)
    targets = HiddenStates(skeleton, text.tokens, text.batch_size)
    embeddings = stored.embeddings()
    with skeleton.substituted(embeddings):
        states = HiddenStates(skeleton, text.tokens, text.batch_size)
        untouched = HiddenStates(skeleton, text.validation_tokens, text.batch_size)
    values: Values = {}
    outcomes = []
    for index, block in iterate_blocks(skeleton):
        targets.advance(index, block)
        prefix = skeleton.structure.block_name(index) + "."
        plain = dict(block.named_modules())
        trained = _prepare(block, prefix, stored, wish, seed, cached)
        untouched.advance(index, block)
        if len(trained):
            objective = BlockObjective(index, block, trained, states, targets, text)
            path = None if folder is None else folder / f"block-{index}.safetensors"
            outcome = train(
                objective, schedule, state=path, journal=journal, meter=meter, team=team
            )
            outcomes.append(outcome)
            values |= {prefix + name: value for name, value in outcome.values.items()}
        with trained.as_stored():
            states.advance(index, block)
        for name in trained.layers:
            parent, _, child = name.rpartition(".")
            setattr(block.get_submodule(parent) if parent else block, child, plain[name])
    before, after = _divergences(stored, embeddings, targets, untouched, states, text)
    return BlockResult(values, tuple(outcomes), before, after)


def _prepare(
    block: nn.Module, prefix: str, stored: StoredModel, wish: Wish, seed: int, cached: bool
) -> Trained:
    """The compressed block in the place of the original one: its layers and its norms."""
    layers = {n.removeprefix(prefix): layer for n, layer in stored.layers(prefix).items()}
    placed = replace_layers(block, layers, wish, seed, cached, prefix)
    norms = norm_weights(block)
    found = {n.removeprefix(prefix): v for n, v in stored.norms(prefix).items()}
    for name, value in found.items():
        norms[name].data = value.to(norms[name])
    wanted = {n: norms[n] for n in found} if "norms" in wish else {}
    dtypes = {n.removeprefix(prefix): dtype for n, dtype in stored.norm_dtypes.items()}
    return Trained(placed, wanted, dtypes)


@torch.no_grad()
def _divergences(
    stored: StoredModel,
    embeddings: Values,
    targets: HiddenStates,
    untouched: HiddenStates,
    tuned: HiddenStates,
    text: TrainingText,
) -> tuple[float, float]:
    """KL from the original on the validation split, of the model as it came and as it is now."""
    skeleton = targets.skeleton
    blocks = skeleton.structure.blocks_name + "."
    outside = {n: v for n, v in stored.norms().items() if not n.startswith(blocks)}
    sums = [0.0, 0.0]
    with skeleton.loaded_outside() as model:
        for place, batch in enumerate(text.validation):
            original = targets.leave(model, batch)
            with with_values(model, outside), skeleton.substituted(embeddings):
                for i, (states, number) in enumerate(((untouched, place), (tuned, batch))):
                    sums[i] += float(divergence(states.leave(model, number), original))
    return sums[0] / len(text.validation), sums[1] / len(text.validation)
