"""The one command of GPU checks runs without a GPU, covers every method, and says what fails."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from convex_caldera.recipes.table import METHODS


@pytest.fixture(scope="module")
def script() -> Any:
    path = Path(__file__).parent.parent / "benchmarks" / "gpu.py"
    spec = importlib.util.spec_from_file_location("gpu_checks", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def arguments(monkeypatch: pytest.MonkeyPatch, *more: str) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--small", *more])


@pytest.mark.slow
def test_small_run_on_the_cpu_passes_and_writes_nothing(
    script: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    out = tmp_path / "gpu.json"
    only = ("codes", "product", "search 2 bits, L = 12", "recipe qtip", "recipe l2qer")
    monkeypatch.setattr(torch, "compile", lambda step: step)  # no compiler where tests run
    arguments(monkeypatch, "--out", str(out), "--only", *only)
    assert script.main() == 0
    text = capsys.readouterr().out
    wanted = 2 * len(script.QUANTIZERS) + 4
    assert text.count("| ok |") == wanted and f"{wanted} checks, 0 failed" in text
    assert ("no GPU here" in text) != torch.cuda.is_available()
    assert not out.exists()


def test_every_method_is_checked(script: Any) -> None:
    assert {f"recipe {name}" for name in METHODS} <= set(script.checks(2.0))


def test_a_wrong_figure_fails_the_run(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(device: torch.device, shape: tuple[int, int]) -> dict[str, float]:
        script.require_close(torch.ones(2), torch.tensor([1.0, 1.001]), "ones")
        return {}

    monkeypatch.setattr(script, "checks", lambda bits: {"wrong": wrong})
    arguments(monkeypatch)
    assert script.main() == 1
    assert "failed: CheckError: ones" in capsys.readouterr().out


def test_work_beyond_the_minutes_is_listed_as_not_run(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments(monkeypatch, "--minutes", "0", "--only", "codes e8p")
    assert script.main() == 0
    assert capsys.readouterr().out.count("not run") == 3


def test_every_finished_row_is_on_disk(
    script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out, seen = tmp_path / "gpu.json", []

    def check(device: torch.device, shape: tuple[int, int]) -> dict[str, float]:
        seen.append(len(json.loads(out.read_text())["rows"]) if out.exists() else 0)
        return {"seconds": 1.0}

    monkeypatch.setattr(script, "checks", lambda bits: dict.fromkeys("abc", check))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    arguments(monkeypatch, "--out", str(out), "--shape", "16", "16")
    sys.argv.remove("--small")
    assert script.main() == 0
    assert seen == [0, 1, 2] and out.with_suffix(".md").read_text().count("| ok |") == 3
