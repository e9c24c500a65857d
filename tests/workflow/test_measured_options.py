"""Options measured once serve other budgets: the same files, and no fit is made twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from convex_caldera.storage.partial import PartialRun
from convex_caldera.workflow.compress import prepare
from convex_caldera.workflow.curvatures import NoCurvature
from convex_caldera.workflow.fitting import Fitter, Task, fit_missing
from convex_caldera.workflow.planning import wishes_of
from convex_caldera.workflow.progress import Silent
from convex_caldera.workflow.settings import make_settings
from tests.workflow.running import compress, snapshot

# Entropy-coded levels: a uniform plan that fits several rungs until their coded sizes fit.
WAY = ("--method", "scl-ecvq", "--coder", "huffman", "--block-size", 1)


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("llama", num_hidden_layers=1)


def kept(folder: Path) -> dict[str, float]:
    """Names of the options on disk, and when each was written."""
    files = (folder / ".partial" / "layers").glob("*.safetensors")
    return {file.name: file.stat().st_mtime_ns for file in files}


def test_another_budget_fits_what_is_new_only_and_ends_in_the_same_files(
    model: Path, text: Path, tmp_path: Path
) -> None:
    measured = tmp_path / "measured"
    for bits in (3, 4):
        ran = compress(model, tmp_path / f"alone{bits}", text, *WAY, "--bits", bits)
        assert ran.code == 0, ran.err
    first = compress(model, tmp_path / "3", text, *WAY, "--bits", 3, "--measured", measured)
    assert first.code == 0, first.err
    before = kept(measured)
    again = compress(model, tmp_path / "3again", text, *WAY, "--bits", 3, "--measured", measured)
    assert again.code == 0 and kept(measured) == before
    other = compress(model, tmp_path / "4", text, *WAY, "--bits", 4, "--measured", measured)
    assert other.code == 0, other.err
    assert before.items() <= kept(measured).items()
    for bits in (3, 4):
        assert snapshot(tmp_path / str(bits)) == snapshot(tmp_path / f"alone{bits}")
    assert snapshot(tmp_path / "3again") == snapshot(tmp_path / "3")


def test_options_of_another_seed_are_refused(model: Path, text: Path, tmp_path: Path) -> None:
    measured = ("--measured", tmp_path / "measured")
    assert compress(model, tmp_path / "a", text, *WAY, "--bits", 3, *measured).code == 0
    ran = compress(model, tmp_path / "b", text, *WAY, "--bits", 3, *measured, "--seed", 7)
    assert ran.code != 0 and "another options" in ran.err


def test_a_method_that_measures_nothing_takes_no_options(
    model: Path, text: Path, tmp_path: Path
) -> None:
    way = ("--method", "rtn", "--bits", 4, "--measured", tmp_path / "measured")
    ran = compress(model, tmp_path / "out", text, *way)
    assert ran.code != 0 and "measures no options" in ran.err


def test_a_kept_fit_of_another_recipe_is_made_again(model: Path, tmp_path: Path) -> None:
    settings = make_settings(model=str(model), method="rtn", bits=4)
    job = prepare(settings)
    site = job.sites[0]
    ladder = job.method.ladder(site.shape, wishes_of(settings, site.name))
    fitter = Fitter(job.skeleton, NoCurvature(), settings.seed)
    with PartialRun(tmp_path / "kept", {"law": "recipe"}) as run:
        losses = []
        for rung in (0, 0, 1):
            fit_missing(fitter, [Task(site.name, site, ladder[rung])], run, "fit", Silent(), 1)
            losses.append(run.record(site.name)["loss"])
    assert losses[0] == losses[1] > losses[2]
