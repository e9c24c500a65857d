"""Several processes train one model: gradients are averaged, the first process writes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from convex_caldera.certify import verify
from convex_caldera.errors import RecipeError
from convex_caldera.finetune.team import Team
from tests.finetune.test_command import QUICK
from tests.workflow.fixtures import Output


def test_alone_nothing_is_averaged() -> None:
    team = Team()
    values = torch.arange(3.0)
    team.average([values])
    team.wait()
    assert (team.index, team.size, team.leads) == (0, 1, True)
    assert torch.equal(values, torch.arange(3.0))


def test_a_team_needs_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(RecipeError, match="accelerate"):
        Team()


@pytest.mark.slow
def test_two_processes_train_one_model(
    compressed: Callable[..., Output], text: Path, tmp_path: Path
) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed (extra `finetune`)")
    made, out = compressed("gptq"), tmp_path / "out"
    launcher = Path(sys.executable).parent / "accelerate"
    done = subprocess.run(
        [
            launcher, "launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
            "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "convex_caldera",
            "finetune", made.directory, "-o", out, "--model", made.model, "--dataset", text,
            *map(str, QUICK), "--train", "lora,norms", "--scope", "model",
        ],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("model: KL") == 1
    assert verify(out, made.model).ok
