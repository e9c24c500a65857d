"""Sweeps: every shipped one is consistent; a grid runs, resumes, and ends in a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from convex_caldera.errors import RecipeError
from convex_caldera.workflow import sweep as sweep_module
from convex_caldera.workflow.stage_config import settings_of
from convex_caldera.workflow.sweep import points, read_sweep, run_sweep, table_text
from convex_caldera.workflow.templates import names
from tests.workflow.staging import short_texts, small  # noqa: F401

pytestmark = pytest.mark.slow

# Of LQER's scripts: method, format, factors, activations, samples.
SHIPPED = {
    "sweep_lqer_act": (
        "l2qer", 32, "mxint4-legacy/16", "mxint8-legacy/16", "mxint8-legacy/16", 32,
    ),
    "sweep_lqer_act_int": ("l2qer", 32, "int4/128", "float16", None, 64),
    "sweep_lqer_act_w-only": ("l2qer", 64, "mxint3-legacy/32", "mxint8-legacy/16", None, 256),
    "sweep_lqer_svd": ("lqer", 32, "mxint4-legacy/16", "mxint8-legacy/16", "mxint8-legacy/16", 32),
    "sweep_baseline_no_lqer": ("no-lqer", None, "mxint8-legacy/0", None, "mxint8-legacy/0", 32),
}  # fmt: skip


def test_every_script_of_the_mission_is_shipped() -> None:
    assert set(SHIPPED) | {"sweep_lqer_family"} == set(names("sweep_"))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_sweeps_mean_what_the_scripts_do(name: str) -> None:
    (cell,) = read_sweep(name).cells
    made = settings_of(cell.config)
    shown = (made.method, made.rank, made.format, made.factor_format, made.activations)
    assert (*shown, made.nsamples) == SHIPPED[name]


def test_axes_and_overrides_replace_values() -> None:
    sweep = read_sweep(
        "sweep_lqer_act", axes=["rank=[4, 8]", "x_width=[8, 6]"], overrides=["profile.seed=5"]
    )
    assert [cell.name for cell in sweep.cells] == [
        f"rank={r},w_width=4,x_width={x},w_block=1x16,x_block=1x16" for r in (4, 8) for x in (8, 6)
    ]
    assert sweep.varied == ("rank", "x_width")
    assert {cell.config.profile.seed for cell in sweep.cells} == {5}
    assert [settings_of(c.config).activations for c in sweep.cells[:2]] == [
        "mxint8-legacy/16", "mxint6-legacy/16",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"axes": ["rang=[4]"]}, "rang"),
        ({"axes": ["rank=4"]}, "rank"),
        ({"overrides": ["l_config.linear.rank=3"]}, "cell rank 32.*l_config.linear.rank = 3"),
        ({"template": "lqer_none"}, "lqer_none"),
    ],
)
def test_impossible_sweeps_are_refused_before_the_first_cell(options: Any, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        read_sweep("sweep_lqer_act", **options)


def test_sweep_files_are_strict(tmp_path: Path) -> None:
    path = tmp_path / "s.toml"
    axis = '[[axis]]\nname = "a"\nvalues = [1]\nkeys = ["profile.seed"]\n'
    for text in (
        'name = "s"\ntemplate = "lqer"\n',
        f'name = "s"\ntemplate = "lqer"\nother = 1\n{axis}',
        f'name = "s"\ntemplate = "lqer"\n{axis}{axis}',
        "name = ",
    ):
        path.write_text(text)
        with pytest.raises(RecipeError):
            read_sweep(str(path))


def test_a_grid_runs_resumes_and_ends_in_one_table(
    tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = [*small(), f'model_name="{tiny_model()}"']
    grid = read_sweep(
        "sweep_lqer_family",
        axes=['method=["no-lqer", "qera-exact"]', "w_width=[2]", "x_width=[8, 6]"],
        overrides=changes,
    )
    record = run_sweep(grid, tmp_path, workers=1)
    assert len(record["cells"]) == 4 and not any("error" in cell for cell in record["cells"])
    assert len(list((tmp_path / "profiles").iterdir())) == 1  # one text, one set of statistics
    kl = {tuple(c["values"].values()): c["kl"] for c in record["cells"]}
    assert kl["qera-exact", 2, 8] < kl["no-lqer", 2, 8]
    table = table_text(record)
    assert "W2A8" in table and "W2A6" in table and "original" in table
    assert json.loads((tmp_path / "sweep.json").read_text()) == json.loads(json.dumps(record))
    assert (tmp_path / "sweep.md").read_text().count("\n| ") == 6
    assert len(list(points(record))) == 4

    monkeypatch.setattr(sweep_module.Stages, "_stage", None)  # nothing may be done again
    assert run_sweep(grid, tmp_path, workers=1) == record


def test_a_cell_that_fails_leaves_the_others(tiny_model: Any, tmp_path: Path) -> None:
    quick = ["enable_perplexity_evaluation=false", "approximate.name=lqer-svd"]
    grid = read_sweep(
        "sweep_lqer_act",
        axes=["rank=[4]", "w_block=[[1, 16]]"],
        overrides=[*small(), *quick, f'model_name="{tiny_model()}"'],
    )
    broken = read_sweep(
        "sweep_lqer_act", axes=["rank=[3]"], overrides=[*quick, 'model_name="/nowhere"']
    )
    both = type(grid)(grid.name, grid.varied, (*broken.cells, *grid.cells))
    record = run_sweep(both, tmp_path, workers=1)
    assert "error" in record["cells"][0] and record["cells"][1]["precision"] == "W4A8"
    assert "rank 3" in table_text(record) and "nowhere" in table_text(record)


def test_the_plot_shows_every_cell(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from convex_caldera.report.sweep import plot_sweep

    cells = [
        {
            "values": {"method": method, "rank": rank},
            "perplexity": 10.0 + rank,
            "perplexity_stderr": None,
            "original_perplexity": 9.0,
            "bits_per_compressed_weight": 4.0 + rank / 10,
        }
        for method in ("lqer", "l2qer")
        for rank in (1, 2)
    ]
    record = {"name": "s", "varied": ["method", "rank"], "cells": cells}
    assert {line for line, *_ in points(record)} == {"method lqer", "method l2qer"}
    assert all(path.stat().st_size > 1000 for path in plot_sweep(record, tmp_path))
    assert plot_sweep({"name": "s", "varied": ["rank"], "cells": []}, tmp_path) == []
