"""The same input, the same bytes: in any order, with any number of workers, from recipe.toml."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from convex_caldera.recipes.table import METHODS
from convex_caldera.workflow import fitting as workflow
from convex_caldera.workflow.fitting import side_by_side
from tests.workflow.fixtures import BITS
from tests.workflow.running import compress, run, snapshot

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("method", METHODS)
def test_recipe_recreates_the_output(
    compressed: Any, text: Path, tmp_path: Path, method: str
) -> None:
    """One worker, where the first run had as many as there are cores."""
    first = compressed(method)
    recipe = first.directory / "convex_caldera" / "recipe.toml"
    ran = run(
        "compress", first.model, "-o", tmp_path / "again", "--config", recipe, "--dataset", text,
        "--workers", 1,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert snapshot(tmp_path / "again") == snapshot(first.directory)


def test_workers_do_not_show(compressed: Any, text: Path, tmp_path: Path) -> None:
    first = compressed("gptq")
    options = ("--method", "gptq", "--bits", BITS, "--workers", 5)
    assert compress(first.model, tmp_path / "again", text, *options).code == 0
    assert snapshot(tmp_path / "again") == snapshot(first.directory)


def test_order_does_not_show(
    compressed: Any, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, order = compressed("caldera"), []

    def backwards(work: Any, items: Any, workers: int) -> Iterator[Any]:
        for site, fit in side_by_side(work, list(items)[::-1], workers):
            order.append(site.name)
            yield site, fit

    monkeypatch.setattr(workflow, "side_by_side", backwards)
    options = ("--method", "caldera", "--bits", BITS, "--workers", 1)
    assert compress(first.model, tmp_path / "again", text, *options).code == 0
    assert len(order) == 14 and "layers.1" in order[0]
    assert snapshot(tmp_path / "again") == snapshot(first.directory)


def test_the_seed_does_show(compressed: Any, text: Path, tmp_path: Path) -> None:
    """Otherwise the tests above would prove nothing."""
    first = compressed("quip-sharp")
    options = ("--method", "quip-sharp", "--bits", BITS, "--seed", 7)
    assert compress(first.model, tmp_path / "other", text, *options).code == 0
    ours, theirs = snapshot(tmp_path / "other"), snapshot(first.directory)
    differing = {name for name in ours | theirs if ours.get(name) != theirs.get(name)}
    assert "model-compressed-00001-of-00001.safetensors" in differing
    assert "model-rest-00001-of-00001.safetensors" not in differing


def test_nothing_of_the_machine_is_written_down(compressed: Any) -> None:
    for method in ("gptq", "convex-caldera"):
        output = compressed(method)
        places = [str(p).encode() for p in (output.directory.parent, output.model, Path.home())]
        for path in output.directory.rglob("*"):
            if path.is_file():
                content = path.read_bytes()
                assert [place for place in places if place in content] == [], path.name
        recipe = (output.directory / "convex_caldera" / "recipe.toml").read_text()
        assert tomllib.loads(recipe)["run"]["model"] == output.model.name
