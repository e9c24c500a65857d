"""What entropy coding saves under a budget is spent on finer codes, and never more than that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from convex_caldera.errors import InterruptedRunError
from convex_caldera.recipes.scl import lloyd_max_recipe
from convex_caldera.storage.layers import LayerEntry
from convex_caldera.storage.read import open_container
from convex_caldera.workflow.compress import compress_to
from convex_caldera.workflow.planning import layout_of
from convex_caldera.workflow.progress import Silent
from convex_caldera.workflow.spending import CodedLadders
from tests.examples import first
from tests.workflow.running import shard_bytes, snapshot
from tests.workflow.test_budget import WIDE, make

SHAPE = (96, 112)


@pytest.fixture(scope="module")
def wide(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("llama", **WIDE)


@pytest.mark.parametrize(
    ("method", "wish"),
    first(
        2,
        [
            ("scl-scalar-uniform", {"bits": 4, "coder": "rans"}),
            ("gptq", {"size": "280kB", "coder": "huffman", "group_size": 32}),
            ("scl-lloyd-max", {"bits": 3, "coder": "rans"}),
            ("caldera", {"bits": 5, "coder": "rans"}),
        ],
    ),
)
def test_saved_bytes_are_spent(
    wide: Path, text: Path, tmp_path: Path, method: str, wish: dict[str, object]
) -> None:
    plain = {key: value for key, value in wish.items() if key != "coder"}
    without = compress_to(make(wide, method, text, **plain), tmp_path / "plain")
    summary = compress_to(make(wide, method, text, **wish), tmp_path / "coded")
    on_disk = shard_bytes(tmp_path / "coded")["compressed"]
    assert open_container(tmp_path / "coded").report()["planned_bytes"] == on_disk
    assert on_disk <= summary.budget_bytes == without.budget_bytes
    assert summary.mean_relative_loss <= without.mean_relative_loss
    if method.startswith("scl"):
        assert on_disk > 0.97 * summary.budget_bytes
        assert summary.mean_relative_loss < 0.8 * without.mean_relative_loss


class Interrupting(Silent):
    """Interrupts the run at the given step."""

    def __init__(self, step: int):
        self.left = step

    def advance(self, note: str = "") -> None:
        del note
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("step", first(1, [8, 3]))
def test_an_interrupted_run_ends_with_the_same_bytes(
    wide: Path, text: Path, tmp_path: Path, step: int
) -> None:
    settings = make(wide, "scl-lloyd-max", text, bits=4, coder="rans")
    compress_to(settings, tmp_path / "whole")
    with pytest.raises(InterruptedRunError):
        compress_to(settings, tmp_path / "torn", progress=Interrupting(step), workers=1)
    compress_to(settings, tmp_path / "torn")
    assert snapshot(tmp_path / "torn") == snapshot(tmp_path / "whole")


def ladders(*names: str) -> CodedLadders:
    recipes = [lloyd_max_recipe(bits) for bits in range(1, 9)]
    return CodedLadders(dict.fromkeys(names, recipes), dict.fromkeys(names, SHAPE))


def shortened(coded: CodedLadders, name: str, rung: int, saved: int) -> LayerEntry:
    spec, layout = layout_of(coded.ladders[name][rung], SHAPE)
    ((field, (dtype, (size,))),) = layout.items()
    return LayerEntry(name, spec, {field: (dtype, (size - saved,))})


def test_a_saving_is_expected_of_other_rungs_too() -> None:
    coded = ladders("a", "b")
    lowest = coded.bytes_of({"a": 2, "b": 2})
    coded.entries["a", 2] = shortened(coded, "a", 2, 800)
    assert coded.bytes_of({"a": 2, "b": 2}) == lowest - 800
    for rung in (3, 7):
        choice = {"a": rung, "b": 2}
        assert coded.bytes_of(choice) == ladders("a", "b").bytes_of(choice) - 800
    below = {"a": 0, "b": 2}
    assert 0 < ladders("a", "b").bytes_of(below) - coded.bytes_of(below) < 800
    assert not coded.measured({"a": 2, "b": 2}) and coded.measured({"a": 2})


def test_what_was_not_measured_is_not_offered_at_the_end() -> None:
    coded = ladders("a", "b")
    for name, rung in (("a", 1), ("a", 3), ("b", 2)):
        coded.entries[name, rung] = shortened(coded, name, rung, 80)
    budget = coded.bytes_of({"a": 1, "b": 2}) + 10_000
    assert coded.fill(budget, only_measured=True) == {"a": 3, "b": 2}
    assert coded.fill(budget - 10_000, only_measured=True) == {"a": 1, "b": 2}
