"""Tuning the whole model on its own predictions: distillation from the original, or a task.

The teacher is the original model run once, a block at a time; its last hidden states wait in
memory and become logits over the whole vocabulary when they are asked for, which costs one head.
So the original and the compressed model are never in memory together.

Source: CALDERA, arXiv 2405.18886 and QuIP#, arXiv 2402.04396 (cross-entropy to the teacher's
distribution, which differs from the KL by a constant); RILQ, arXiv 2412.01129 (the model's loss
makes a small rank enough).
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from convex_caldera.finetune.losses import divergence, mixed_precision, next_token_loss
from convex_caldera.finetune.place import Trained
from convex_caldera.finetune.training import Meter
from convex_caldera.finetune.windows import TrainingText
from convex_caldera.models.blocks import HiddenStates, iterate_blocks
from convex_caldera.models.skeleton import Skeleton


class Teacher:
    """The original's logits on every batch of a text; close it to free its head.

    Memory: windows * length * width values, the embedding and the head.
    """

    def __init__(self, skeleton: Skeleton, text: TrainingText, meter: Meter | None = None):
        self._states = HiddenStates(skeleton, text.tokens, text.batch_size)
        if meter is not None:
            meter.start("original", len(skeleton.structure.blocks))
        for index, block in iterate_blocks(skeleton):
            self._states.advance(index, block)
            if meter is not None:
                meter.advance()
        self._exits = ExitStack()
        self._model = self._exits.enter_context(skeleton.loaded_outside())

    def logits(self, batch: int) -> Tensor:
        """(samples, length, vocabulary), float32, without gradients."""
        return self._states.leave(self._model, batch)

    def close(self) -> None:
        """Free the embedding and the head."""
        self._exits.close()


class Distillation:
    """KL from the original over the full vocabulary; an `Objective`."""

    name = "model"

    def __init__(self, model: nn.Module, trained: Trained, teacher: Teacher, text: TrainingText):
        self.model, self.trained, self.teacher, self.text = model, trained, teacher, text
        self.batches = len(text.training)

    def loss(self, batch: int) -> Tensor:
        """Mean KL(original || this) over the tokens of one batch, in nats."""
        logits = predictions(self.model, self.text.batch(batch))
        return divergence(logits, self.teacher.logits(batch))

    def validation(self) -> float:
        """Mean over the validation batches."""
        losses = [float(self.loss(batch)) for batch in self.text.validation]
        return sum(losses) / len(losses)


class LanguageModelling:
    """Next-token loss on a text, without the original; an `Objective`."""

    name = "model"

    def __init__(self, model: nn.Module, trained: Trained, text: TrainingText):
        self.model, self.trained, self.text = model, trained, text
        self.batches = len(text.training)

    def loss(self, batch: int) -> Tensor:
        """Mean -log q(token) of one batch."""
        tokens = self.text.batch(batch)
        logits = predictions(self.model, tokens)
        return next_token_loss(logits, tokens.to(logits.device))

    def validation(self) -> float:
        """Mean over the validation batches."""
        losses = [float(self.loss(batch)) for batch in self.text.validation]
        return sum(losses) / len(losses)


def predictions(model: nn.Module, tokens: Tensor, **options: Any) -> Tensor:
    """Logits of a model on tokens (samples, length), computing in bfloat16 where it can."""
    device = next(model.parameters()).device
    with mixed_precision(device):
        return model(input_ids=tokens.to(device), use_cache=False, **options).logits


def checkpoint_blocks(model: Any, blocks: list[nn.Module]) -> None:
    """Keep only the inputs of blocks and compute them again in the backward pass.

    transformers does so in training mode only; the blocks alone are put into it, so that no
    dropout begins to act.
    """
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for block in blocks:
        block.training = True


@torch.no_grad()
def mean_divergence(model: nn.Module, teacher: Teacher, text: TrainingText) -> float:
    """KL from the original on the validation split."""
    losses = [
        float(divergence(predictions(model, text.batch(batch)), teacher.logits(batch)))
        for batch in text.validation
    ]
    return sum(losses) / len(losses)
