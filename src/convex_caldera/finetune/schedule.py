"""How long to train and how fast: epochs, learning rate, time, and when to stop."""

from __future__ import annotations

import math
from dataclasses import dataclass

from convex_caldera.errors import RecipeError


@dataclass(frozen=True)
class Schedule:
    """AdamW with warm-up and cosine, as every recipe of the literature has it.

    Args:
        lr: relative step: 0.001 moves a tensor by about a thousandth of its size per step.
        epochs: passes over the training windows; a fraction is allowed.
        warmup: share of the steps in which the rate rises from zero.
        weight_decay: of AdamW, towards zero.
        clip: largest norm of the gradient.
        evaluations: of the validation split per epoch.
        patience: evaluations without a new best before it stops; 0 never stops early.
        seconds: budget of one run; the rate falls with time as it would with steps, so that the
            last step is a small one either way. None is no budget.
        seed: of the order of batches.

    Raises:
        RecipeError: a number out of range.
    """

    lr: float = 5e-3
    epochs: float = 2.0
    warmup: float = 0.05
    weight_decay: float = 0.0
    clip: float = 1.0
    evaluations: int = 4
    patience: int = 4
    seconds: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.lr < 1 or not self.epochs > 0 or not 0 <= self.warmup < 1:
            raise RecipeError(
                f"need 0 < lr < 1, epochs > 0 and 0 <= warmup < 1, got lr {self.lr}, "
                f"epochs {self.epochs}, warmup {self.warmup}"
            )
        if self.evaluations < 1 or self.patience < 0 or self.clip <= 0 or self.weight_decay < 0:
            raise RecipeError(
                f"need evaluations >= 1, patience >= 0, clip > 0 and weight_decay >= 0, got {self}"
            )
        if self.seconds is not None and not self.seconds > 0:
            raise RecipeError(f"the time budget must be positive, got {self.seconds} s")

    def steps(self, batches: int) -> int:
        """Optimizer steps for so many training batches; at least one."""
        return max(1, round(self.epochs * batches))

    def evaluation_interval(self, batches: int) -> int:
        """Steps between two evaluations."""
        return max(1, batches // self.evaluations)

    def rate(self, progress: float) -> float:
        """The learning rate after a share `progress` of the run."""
        progress = min(max(progress, 0.0), 1.0)
        if progress < self.warmup:
            return self.lr * max(progress / self.warmup, 0.02)
        cosine = math.cos(math.pi * (progress - self.warmup) / (1 - self.warmup))
        return self.lr * 0.5 * (1 + cosine)
