"""`eval --tasks` on tiny models: one table, resumed part by part, wrong input in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from convex_caldera.workflow import zero_shot
from tests.evaluate.task_rows import NATIVE, write
from tests.optional import needs
from tests.tiny_models import SENTENCES
from tests.workflow.running import run

pytestmark = [pytest.mark.slow, needs("lm_eval")]
TASKS = "piqa,lambada,wikitext2"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "held.txt").write_text("\n".join(SENTENCES * 20))
    return write(tmp_path / "data", NATIVE)


def arguments(models: list[Path], data: Path, tasks: str = TASKS) -> list[Any]:
    return [
        "eval", *models, "--tasks", tasks, "--task-data", data, "--window", 16,
        "--text", data.parent / "held.txt", "--max-tokens", 200,
    ]  # fmt: skip


def test_one_table_in_four_forms(tiny_model: Callable, data: Path, tmp_path: Path) -> None:
    models = [tiny_model("llama"), tiny_model("llama", seed=1)]
    ran = run(
        *arguments(models, data), "--protocol", "both", "-o", tmp_path / "out",
        json_to=tmp_path / "eval.json",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    original, other = ran.json["models"]
    assert ran.json["columns"] == ["piqa", "lambada", "wikitext2-token", "wikitext2-word"]
    assert original["kl"] == 0 < other["kl"] and original["top1_agreement"] == 1
    for model in (original, other):
        assert set(model["tasks"]["piqa"]) == {"acc", "acc_norm"}
        assert model["tasks"]["wikitext2-token"]["token_perplexity"]["value"] > 1
    assert "difference" in other["tasks"]["piqa"]["acc"]
    assert "difference" not in original["tasks"]["piqa"]["acc"]
    header = (tmp_path / "out" / "eval.csv").read_text().splitlines()[0]
    assert "wikitext2 ppl per token @16" in header and "wikitext2 ppl per word" in header
    assert "KL, nats per token" in header and "piqa acc_norm, %" in header
    for suffix, mark in (("md", "| model |"), ("tex", r"\begin{tabular}"), ("txt", "model ")):
        assert (tmp_path / "out" / f"eval.{suffix}").read_text().startswith(mark)
    assert json.loads((tmp_path / "out" / "eval.json").read_text()) == ran.json


def test_finished_parts_are_not_scored_again(
    tiny_model: Callable, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, scored = [tiny_model("llama")], []
    real = zero_shot.run_task

    def counted(
        name: str, model: Any, tokenizer: Any, task: Any, *rest: Any, **options: Any
    ) -> Any:
        scored.append(task.name)
        if task.name == "lambada" and len(scored) == 2:
            raise KeyboardInterrupt
        return real(name, model, tokenizer, task, *rest, **options)

    monkeypatch.setattr(zero_shot, "run_task", counted)
    command = [*arguments(models, data, "piqa,lambada"), "-o", tmp_path / "out"]
    assert run(*command).code == 5
    first = run(*command, json_to=tmp_path / "a.json")
    assert first.code == 0 and scored == ["piqa", "lambada", "lambada"]
    again = run(*command, json_to=tmp_path / "b.json")
    assert scored == ["piqa", "lambada", "lambada"] and again.json == first.json
    assert run(*command, "--limit", 2).code == 0
    assert scored == ["piqa", "lambada", "lambada", "piqa", "lambada"]


@pytest.mark.parametrize(
    ("extra", "code", "message"),
    [
        (["--tasks", "pika"], 2, "did you mean piqa"),
        (["--tasks", "boolq,arc_challenge"], 2, "no arc_challenge"),
        (["--tasks", "piqa", "--limit", "0"], 2, "at least 1"),
        (["--tasks", "piqa", "--protocol", "characters"], 2, "none of token, word, both"),
        (["--tasks", "piqa", "--batch-size", "many"], 2, "'many' is neither"),
        (["--tasks", "wikitext2", "--task-data", "hub"], 0, ""),
        (["--limit", "3"], 2, "goes with --tasks"),
    ],
)
def test_wrong_options_are_one_line(
    extra: list[str], code: int, message: str, tiny_model: Callable, data: Path
) -> None:
    # A file that is named for the task comes before the hub, so nothing is fetched.
    named = ["--task-data", f"wikitext2={data / 'wikitext2.txt'}"] if "hub" in extra else []
    folder = ["--task-data", data] if "--tasks" in extra and not named else []
    text = ["--text", data.parent / "held.txt", "--window", 16, "--max-tokens", 100]
    ran = run("eval", tiny_model("llama"), *text, *folder, *named, *extra)
    assert ran.code == code and message in ran.err and "Traceback" not in ran.err
