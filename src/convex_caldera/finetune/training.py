"""The one training loop: AdamW, cosine, early stopping, the best state kept, resumable.

A step is a function of the state before it and of the batch that the seed and the step's number
name; the state is on disk after every evaluation. A run that is killed therefore goes on to the
same numbers (with a time budget: to numbers as good). The state that counts is the one that would
be written, tensors rounded to their stored precision; the state before the first step counts too,
so the result is never worse on the validation split than what came in.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from convex_caldera.core.seeds import generator
from convex_caldera.errors import NumericalError
from convex_caldera.finetune.journal import Journal
from convex_caldera.finetune.place import Trained, Values
from convex_caldera.finetune.schedule import Schedule
from convex_caldera.finetune.state import Position, load_state, save_state
from convex_caldera.finetune.team import Team

BETAS = (0.9, 0.95)
EPSILON = 1e-10  # gradients in phi are gradients of relative changes, often 1e-6


class Objective(Protocol):
    """What is trained, on which batches, and how well it does on the validation split."""

    name: str
    trained: Trained
    batches: int

    def loss(self, batch: int) -> Tensor:
        """Differentiable loss of one training batch."""

    def validation(self) -> float:
        """Mean loss over the validation split; called without gradients."""


class Meter(Protocol):
    """Told of steps; a stage of a progress display."""

    def start(self, stage: str, total: int) -> None: ...

    def advance(self, note: str = "") -> None: ...


@dataclass(frozen=True)
class Outcome:
    """What a run has found; `values` is empty if nothing was better than the start.

    `stopped` says why it ended early, in words, or is empty.
    """

    name: str
    first: float
    best: float
    best_step: int
    steps: int
    seconds: float
    stopped: str
    values: Values
    evaluations: tuple[tuple[int, float], ...]


def train(
    objective: Objective,
    schedule: Schedule,
    *,
    state: Path | None = None,
    journal: Journal | None = None,
    meter: Meter | None = None,
    team: Team | None = None,
) -> Outcome:
    """Train to the end of the schedule, or on from what `state` holds; the best values stay set.

    Raises:
        NumericalError: the loss is NaN or infinite before anything was trained.
        ResumeError: `state` is damaged.
    """
    run = _Run(objective, schedule, state, journal or Journal(), meter, team or Team())
    return run.finish() if run.position.stopped else run.go()


class _Run:
    def __init__(
        self,
        objective: Objective,
        schedule: Schedule,
        state: Path | None,
        journal: Journal,
        meter: Meter | None,
        team: Team,
    ):
        self.objective, self.schedule = objective, schedule
        self.path, self.journal, self.meter, self.team = state, journal, meter, team
        self.trained = objective.trained
        self.optimizer = torch.optim.AdamW(
            self.trained.parameters,
            lr=schedule.lr,
            betas=BETAS,
            eps=EPSILON,
            weight_decay=schedule.weight_decay,
        )
        per_epoch = max(1, objective.batches // team.size)
        self.total = schedule.steps(per_epoch)
        self.interval = schedule.evaluation_interval(per_epoch)
        self.position = Position()
        self.best: Values = {}
        self._began = time.monotonic()
        self._resume()

    # --- the loop ----------------------------------------------------------------------------

    def go(self) -> Outcome:
        position = self.position
        if math.isnan(position.first):
            self._evaluate()
        if self.meter is not None:
            self.meter.start(self.objective.name, self.total)
            for _ in range(position.step):
                self.meter.advance()
        while position.step < self.total and not position.stopped:
            loss = self._step()
            if position.stopped:
                break
            position.step += 1
            if self.meter is not None:
                self.meter.advance(f"loss {loss:.4g}, validation {position.best:.4g}")
            if position.step % self.interval == 0 or position.step == self.total:
                self._evaluate()
        self._save()
        return self.finish()

    def _step(self) -> float:
        position, schedule = self.position, self.schedule
        batch = self._batch(position.step)
        rate = schedule.rate(self._progress())
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        loss = self.objective.loss(batch)
        value = float(loss.detach())
        loss.backward()  # a loss that is NaN makes every process of the team see NaN below
        gradients = [p.grad for p in self.trained.parameters if p.grad is not None]
        self.team.average(gradients)
        norm = torch.nn.utils.clip_grad_norm_(self.trained.parameters, schedule.clip)
        if not (math.isfinite(value) and torch.isfinite(norm)):
            position.stopped = (
                f"loss {value}, gradient {float(norm)} at step {position.step + 1} "
                f"(batch {batch}) of {self.objective.name}; lower --lr"
            )
            self._write("stopped", step=position.step, reason=position.stopped)
            return value
        self.optimizer.step()
        self._write("step", step=position.step + 1, loss=value, lr=rate, gradient=float(norm))
        return value

    def _progress(self) -> float:
        """Share of the run that is over, in steps or in time, whichever is further."""
        share = self.position.step / self.total
        if self.schedule.seconds is not None:
            share = max(share, self._seconds() / self.schedule.seconds)
        return share

    def _batch(self, step: int) -> int:
        """The batch of this process in a step: an order of its own in every epoch."""
        count = self.objective.batches
        number = step * self.team.size + self.team.index
        order = torch.randperm(
            count,
            generator=generator(
                self.schedule.seed, self.objective.name, f"epoch {number // count}"
            ),
        )
        return int(order[number % count])

    # --- evaluations -------------------------------------------------------------------------

    def _evaluate(self) -> None:
        position = self.position
        with torch.no_grad(), self.trained.as_stored():
            found = self.objective.validation()
        if math.isnan(position.first):
            if not math.isfinite(found):
                raise NumericalError(
                    f"{self.objective.name}: the validation loss is {found} before any training; "
                    "the compressed model is damaged, or evaluate it in float32"
                )
            position.first = position.best = found
        elif math.isfinite(found) and found < position.best:
            position.best, position.best_step, position.strikes = found, position.step, 0
            self.best = self.trained.values()
        else:
            position.strikes += 1
        position.evaluations.append((position.step, found))
        self._write("validation", step=position.step, loss=found, best=position.best)
        patience = self.schedule.patience
        seconds = self.schedule.seconds
        if not math.isfinite(found):
            position.stopped = f"validation loss {found} after step {position.step}; lower --lr"
        elif patience and position.strikes >= patience:
            position.stopped = f"no better for {patience} evaluations"
        elif seconds is not None and self._seconds() >= seconds:
            position.stopped = f"time budget of {seconds:.0f} s is used"
        self._save()

    def finish(self) -> Outcome:
        """Set the best values, or those of the start where nothing was better."""
        position = self.position
        self.trained.assign(self.best or self.start)
        return Outcome(
            self.objective.name,
            position.first,
            position.best,
            position.best_step,
            position.step,
            position.seconds,
            position.stopped,
            self.best,
            tuple(position.evaluations),
        )

    # --- state -------------------------------------------------------------------------------

    def _seconds(self) -> float:
        return self.position.seconds + time.monotonic() - self._began

    def _save(self) -> None:
        self.position.seconds = self._seconds()
        self._began = time.monotonic()
        if self.path is None or not self.team.leads:
            return
        tensors = {f"start/{name}": value for name, value in self.start.items()}
        tensors |= {f"best/{name}": value for name, value in self.best.items()}
        for name, each in self.trained.tensors.items():
            tensors[f"phi/{name}"] = each.phi
            moments = self.optimizer.state.get(each.phi)
            if moments:
                tensors[f"first/{name}"] = moments["exp_avg"]
                tensors[f"second/{name}"] = moments["exp_avg_sq"]
        save_state(self.path, tensors, self.position)

    def _resume(self) -> None:
        found = None if self.path is None else load_state(self.path)
        if found is None:
            self.start = self.trained.values()
            return
        tensors, self.position = found
        groups: dict[str, Values] = {}
        for name, tensor in tensors.items():
            group, _, rest = name.partition("/")
            groups.setdefault(group, {})[rest] = tensor
        self.start, self.best = groups["start"], groups.get("best", {})
        for name, each in self.trained.tensors.items():
            with torch.no_grad():
                each.phi.copy_(groups["phi"][name])
            if "first" in groups and name in groups["first"]:
                self.optimizer.state[each.phi] = {
                    "step": torch.tensor(float(self.position.step)),
                    "exp_avg": groups["first"][name].to(each.phi.device),
                    "exp_avg_sq": groups["second"][name].to(each.phi.device),
                }
        self._write("resumed", step=self.position.step)

    def _write(self, event: str, **figures: object) -> None:
        if self.team.leads:
            self.journal.write(self.objective.name, event, **figures)
