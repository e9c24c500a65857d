"""The loop: never worse than it began, resumable, and it stops where it must."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from convex_caldera.errors import DataError, NumericalError, RecipeError, ResumeError
from convex_caldera.finetune.journal import Journal
from convex_caldera.finetune.parts import Tuned
from convex_caldera.finetune.place import Trained
from convex_caldera.finetune.schedule import Schedule
from convex_caldera.finetune.training import Outcome, train
from convex_caldera.finetune.windows import split_windows


class Parabola:
    """Every batch pulls x towards a target of its own; validation towards their mean."""

    name = "parabola"

    def __init__(self, batches: int = 6, start: float = 0.5, bad_at: int | None = None):
        self.x = torch.nn.Parameter(torch.full((4,), start))
        self.trained = Trained({}, {"x": self.x}, {"x": torch.float16})
        self.batches, self.bad_at, self.calls = batches, bad_at, 0
        self.evaluated: list[Tensor] = []

    def loss(self, batch: int) -> Tensor:
        self.calls += 1
        loss = (self.x - 1 - 0.1 * batch / self.batches).square().mean()
        return loss * math.nan if self.calls == self.bad_at else loss

    def validation(self) -> float:
        self.evaluated.append(self.x.detach().clone())
        return float((self.x - 1).square().mean().detach())


LONG = Schedule(lr=0.05, epochs=5, patience=0)


def same(a: Outcome, b: Outcome) -> None:
    assert (a.first, a.best, a.best_step, a.steps) == (b.first, b.best, b.best_step, b.steps)
    assert a.evaluations == b.evaluations
    assert all(torch.equal(a.values[name], b.values[name]) for name in a.values)


def test_it_learns_and_keeps_the_best_as_it_is_stored() -> None:
    problem = Parabola()
    outcome = train(problem, LONG)
    assert outcome.best < 0.1 * outcome.first
    assert outcome.values["x"].dtype == torch.float16
    assert torch.equal(outcome.values["x"].float(), problem.x.detach())
    assert problem.validation() == outcome.best == min(loss for _, loss in outcome.evaluations)
    assert all(torch.equal(x, x.half().float()) for x in problem.evaluated)


def test_it_is_never_worse_than_before() -> None:
    problem = Parabola(start=1.0)
    outcome = train(problem, Schedule(lr=0.5, epochs=3, patience=0))
    assert outcome.best == outcome.first == 0.0 and outcome.best_step == 0
    assert not outcome.values and torch.equal(problem.x.detach(), torch.ones(4))


def test_it_stops_early_when_nothing_gets_better() -> None:
    outcome = train(Parabola(start=1.0), Schedule(lr=0.1, epochs=50, evaluations=1, patience=2))
    assert outcome.steps == 12 and "no better for 2" in outcome.stopped


@pytest.mark.parametrize("cut", [1, 2, 4])
def test_a_cut_run_goes_on_to_the_same_numbers(cut: int, tmp_path: Path) -> None:
    whole = train(Parabola(), LONG)

    class CutError(Exception):
        pass

    class Dying(Parabola):
        def validation(self) -> float:
            if len(self.evaluated) == cut:
                raise CutError
            return super().validation()

    with pytest.raises(CutError):
        train(Dying(), LONG, state=tmp_path / "state")
    same(train(Parabola(), LONG, state=tmp_path / "state"), whole)
    finished = Parabola()
    same(train(finished, LONG, state=tmp_path / "state"), whole)
    assert finished.calls == 0, "a finished run is only read"


def test_nan_stops_says_where_and_keeps_the_best(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "log.jsonl")
    problem = Parabola(bad_at=14)
    outcome = train(problem, LONG, journal=journal, state=tmp_path / "state")
    assert outcome.steps == 13 and "step 14 (batch" in outcome.stopped
    assert torch.isfinite(problem.x).all()
    assert problem.validation() == outcome.best < outcome.first
    events = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [e["event"] for e in events].count("step") == 13
    assert events[-1]["event"] == "stopped" and "batch" in events[-1]["reason"]
    same(train(Parabola(), LONG, state=tmp_path / "state"), outcome)


def test_nan_before_training_is_an_error() -> None:
    with pytest.raises(NumericalError, match="before any training"):
        train(Parabola(start=math.nan), LONG)


def test_a_damaged_state_is_refused(tmp_path: Path) -> None:
    train(Parabola(), LONG, state=tmp_path / "state")
    raw = (tmp_path / "state").read_bytes()
    (tmp_path / "state").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(ResumeError, match="damaged"):
        train(Parabola(), LONG, state=tmp_path / "state")


def test_a_time_budget_ends_the_run_with_a_small_step(monkeypatch: pytest.MonkeyPatch) -> None:
    from convex_caldera.finetune import training

    clock = iter(float(second) for second in range(10_000))
    monkeypatch.setattr(training.time, "monotonic", lambda: next(clock))
    outcome = train(Parabola(), Schedule(lr=0.05, epochs=500, seconds=60.0, patience=0))
    assert "time budget of 60 s" in outcome.stopped
    assert 5 < outcome.steps < 60 and outcome.best < outcome.first


def test_the_rate_rises_then_falls_to_nothing() -> None:
    schedule = Schedule(lr=0.01, warmup=0.1)
    rates = [schedule.rate(i / 100) for i in range(101)]
    assert max(rates) == pytest.approx(0.01) and rates.index(max(rates)) == 10
    assert rates[0] < 0.001 and rates[100] == pytest.approx(0.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.parametrize(
    "options",
    [{"lr": 0.0}, {"epochs": 0}, {"warmup": 1.0}, {"evaluations": 0}, {"seconds": -1.0},
     {"patience": -1}],
)  # fmt: skip
def test_impossible_schedules_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(RecipeError):
        Schedule(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("count", "batch"), [(2, 8), (9, 4), (64, 8), (65, 8)])
def test_windows_are_split_without_overlap(count: int, batch: int) -> None:
    tokens = torch.arange(count * 3).view(count, 3)
    text = split_windows(tokens, batch)
    training = torch.cat([text.batch(i) for i in text.training])
    validation = torch.cat([text.batch(i) for i in text.validation])
    assert torch.equal(validation, text.validation_tokens)
    assert torch.equal(validation, tokens[count - len(validation) :])
    assert len(training) and not set(training.flatten().tolist()) & set(
        validation.flatten().tolist()
    )
    assert len(training) + len(validation) > count - batch


def test_one_window_cannot_be_split() -> None:
    with pytest.raises(DataError, match="cannot be split"):
        split_windows(torch.zeros(1, 8, dtype=torch.int64), 4)


def test_an_unscaled_tensor_is_rounded_to_its_own_dtype() -> None:
    each = Tuned(torch.nn.Parameter(torch.tensor([1.0001])), 1.0, torch.bfloat16)
    assert float(each.stored()) == 1.0
