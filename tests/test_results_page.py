"""docs/results.md is what the script makes of the benchmarks' JSON, nothing typed by hand."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def script() -> Any:
    path = ROOT / "benchmarks" / "results_page.py"
    spec = importlib.util.spec_from_file_location("results_page", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


def test_the_page_says_context_and_fine_tuning_of_every_printed_figure(script: Any) -> None:
    text = script.page()
    for context in (2048, 4096):
        for tuned in ("fine-tuned", "not fine-tuned"):
            assert f"ctx {context}, {tuned} (papers)" in text
    for figure in script.published.FIGURES:
        cell = script.published.cell(
            figure.method, figure.budget, figure.context, figure.fine_tuned
        )
        assert cell.startswith(f"{figure.perplexity:.2f} (")


def test_the_page_holds_what_was_measured(script: Any) -> None:
    text = script.page()
    for row in script.read("quality")["rows"]:
        if "kl" in row:
            assert f"{row['kl']:.4f} ± {row['kl_stderr']:.4f}" in text
    assert "## Perplexity and KL at equal bytes" in (ROOT / "docs" / "results.md").read_text()


def test_recipes_are_commands_with_predictions(script: Any) -> None:
    layer = {"size": 4096, "threads": 2}
    row = {
        "model": "owner/name", "method": "rtn", "command": "convex-caldera compress owner/name",
        "bits_per_compressed_weight": 2.2, "bits_per_weight": 2.9, "file_bytes": 1_500_000_000,
        "original_bytes": 13_000_000_000, "peak_memory_bytes": 4_200_000_000, "fit_hours": 30.6,
    }  # fmt: skip
    parts = script.recipes({"layer": layer, "nsamples": 1, "seqlen": 2, "rows": [row]})
    assert "| owner/name | rtn | 2.200 | 2.900 | 1.50 | 13.00 | 4.2 | 31 |" in parts[2]
    assert parts[3] == "    convex-caldera compress owner/name"
    assert script.recipes(None) == []


def test_no_printed_figure_stands_under_another_context(script: Any) -> None:
    cell = script.published.cell
    assert cell("quip-sharp", 2.2, 4096, False).startswith("8.22")
    assert cell("quip-sharp", 2.2, 2048, False) == "-"
    assert cell("original", 3.2, 2048, False).startswith("5.47")
    assert cell("convex-caldera", 2.2, 4096, False) == "-"
