"""`convex-caldera finetune` from a compressed directory to another one."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from convex_caldera.certify import verify
from convex_caldera.core.terms import Coded
from convex_caldera.runtime.load import load
from convex_caldera.storage import open_container
from tests.loading import from_transformers
from tests.workflow.fixtures import Output
from tests.workflow.killing import start
from tests.workflow.running import Ran, run, shard_bytes, snapshot

pytestmark = pytest.mark.slow

QUICK = (
    "--nsamples", 24, "--seqlen", 16, "--batch-size", 4, "--epochs", 3, "--lr", 0.004,
    "--evaluations", 1, "--allow-short",
)  # fmt: skip
TOKENS = torch.arange(24).view(2, 12) * 7 % 320


def finetune(made: Output, out: Path, text: Path, *options: object, **keywords: Any) -> Ran:
    return run(
        "finetune", made.directory, "-o", out, "--model", made.model, "--dataset", text, *QUICK,
        *options, json_to=out.with_suffix(".json"), **keywords,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("method", "scope", "train"),
    [
        ("caldera", "both", "lowrank,signs,norms"),
        ("gptq", "block", "scales,norms"),
        ("convex-caldera", "model", "lora,dora"),
    ],
)
def test_tuned_model_is_a_normal_output(
    method: str,
    scope: str,
    train: str,
    compressed: Callable[..., Output],
    text: Path,
    tmp_path: Path,
) -> None:
    made, out = compressed(method), tmp_path / "out"
    before = snapshot(made.directory)
    ran = finetune(made, out, text, "--scope", scope, "--train", train, "--rank-trainable", 2)
    assert ran.code == 0, ran.err
    assert snapshot(made.directory) == before
    phases = ran.json["phases"]
    assert [p["name"] for p in phases] == {"both": ["blocks", "model"], "block": ["blocks"]}.get(
        scope, ["model"]
    )
    assert all(p["after"] <= p["before"] for p in phases)
    assert phases[-1]["after"] < phases[0]["before"]

    result = verify(out, made.model)
    assert result.ok, result.text()
    assert "fine-tuning" in result.text()
    ours, theirs = load(out, dtype=torch.float32), from_transformers(out, dtype=torch.float32)
    with torch.no_grad():
        logits = ours(TOKENS).logits
        assert torch.equal(logits, theirs(TOKENS).logits)
        assert not torch.equal(logits, load(made.directory, dtype=torch.float32)(TOKENS).logits)

    sizes, old = open_container(out).sizes(), open_container(made.directory).sizes()
    assert sizes.compressed_bytes == shard_bytes(out)["compressed"]
    assert ran.json["after"]["bits_per_compressed_weight"] == sizes.bits_per_compressed_weight
    assert (sizes.compressed_bytes > old.compressed_bytes) == (train != "scales,norms")
    assert run("inspect", out).code == 0


def test_codes_and_everything_else_stay(
    compressed: Callable[..., Output], text: Path, tmp_path: Path
) -> None:
    made, out = compressed("caldera"), tmp_path / "out"
    parts = ("--scope", "block", "--train", "signs", "--epochs", 1)
    assert finetune(made, out, text, *parts).code == 0
    old, new = open_container(made.directory), open_container(out)
    for name in old.layers:
        before, after = old.layer(name).terms, new.layer(name).terms
        assert len(before) == len(after)
        for a, b in zip(before, after, strict=True):
            sides = [(a, b)] if isinstance(a, Coded) else [(a.left, b.left), (a.right, b.right)]
            assert all(torch.equal(x.codes, y.codes) for x, y in sides if isinstance(x, Coded))
    for name in old.rest:
        assert torch.equal(old.tensor(name), new.tensor(name))
    kept = ("tokenizer.json", "config.json")
    assert all((made.directory / f).read_bytes() == (out / f).read_bytes() for f in kept)


def test_tuning_can_be_repeated(
    compressed: Callable[..., Output], text: Path, tmp_path: Path
) -> None:
    made = compressed("gptq")
    first, second = tmp_path / "first", tmp_path / "second"
    parts = ("--train", "lora,dora,norms", "--scope", "model", "--rank-trainable", 2)
    assert finetune(made, first, text, *parts).code == 0
    again = Output(first, made.model, made.method, made.ran)
    ran = finetune(again, second, text, *parts, "--seed", 7)
    assert ran.code == 0, ran.err
    result = verify(second, made.model)
    assert result.ok, result.text()
    sizes = [open_container(d).sizes().compressed_bytes for d in (made.directory, first, second)]
    assert sizes[0] < sizes[1] == sizes[2]
    recipe = open_container(second).recipe()
    assert [table["seed"] for table in recipe["finetune"]] == [42, 7]
    assert (
        len(json.loads((second / "convex_caldera/provenance.json").read_text())["tuned_from"]) == 2
    )


def test_a_killed_run_resumes_to_the_same_files(
    compressed: Callable[..., Output], text: Path, tmp_path: Path
) -> None:
    made = compressed("gptq")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    parts = ("--train", "norms,scales")
    assert finetune(made, whole, text, *parts).code == 0
    arguments = [
        "finetune", made.directory, "-o", cut, "--model", made.model, "--dataset", text, *QUICK,
        *parts,
    ]  # fmt: skip
    process = start(arguments, die_at=9)  # a state in the middle of the second block
    process.join()
    assert process.exitcode == -signal.SIGKILL
    states = {path.name for path in (cut / ".partial").glob("*.safetensors")}
    assert states == {"block-0.safetensors", "block-1.safetensors"}
    assert run(*arguments).code == 0
    assert snapshot(cut) == snapshot(whole)


def test_task_without_the_original(
    compressed: Callable[..., Output], text: Path, tmp_path: Path
) -> None:
    made, out = compressed("gptq"), tmp_path / "out"
    ran = run(
        "finetune", made.directory, "-o", out, "--scope", "model", "--loss", "task", "--train",
        "lora", "--dataset", text, *QUICK, "--checkpointing", json_to=tmp_path / "r.json",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    (phase,) = ran.json["phases"]
    assert phase["loss"] == "task loss" and phase["after"] < phase["before"]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_choices_and_labels_are_learned(compressed: Callable[..., Output], tmp_path: Path) -> None:
    made = compressed("gptq")
    rows = [
        {"text": f"The dog {i} is", "good": "quick", "bad": "lazy", "label": 0, "mood": "yes"}
        for i in range(24)
    ]
    data = write_rows(tmp_path / "task.jsonl", rows)
    common = (
        "finetune", made.directory, "--scope", "model", "--loss", "task", "--train", "lora",
        "--dataset", data, *QUICK, "--text-field", "text",
    )  # fmt: skip
    for name, options in (
        ("choice", ("--choice-field", "good", "--choice-field", "bad")),
        ("labels", ("--label-name", "yes", "--label-name", "no", "--label-field", "mood")),
    ):
        ran = run(*common, "-o", tmp_path / name, *options, json_to=tmp_path / f"{name}.json")
        assert ran.code == 0, ran.err
        (phase,) = ran.json["phases"]
        assert phase["after"] < phase["before"] and "accuracy" in phase["note"]


# --- bad input ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--train", "lowrank,signs,codebooks"), ["no trainable part", "no layer has low-rank"]),
        (("--train", "weights"), ["unknown part 'weights'"]),
        (("--train", "lora", "--loss", "mse"), ["mse is the loss of"]),
        (("--scope", "block", "--train", "lora", "--loss", "kl"), ["blocks are trained on mse"]),
        (("--train", "lora", "--lr", 0), ["lr"]),
        (("--train", "lora", "--seqlen", 4096), ["reads at most 64"]),
    ],
)
def test_bad_wishes_are_refused_before_any_work(
    options: tuple[object, ...],
    words: list[str],
    compressed: Callable[..., Output],
    text: Path,
    tmp_path: Path,
) -> None:
    ran = finetune(compressed("gptq"), tmp_path / "out", text, *options)
    assert ran.code == 2
    assert ran.err.startswith("error: ") and ran.err.count("\n") == 1
    assert all(word in ran.err for word in words), ran.err
    assert not (tmp_path / "out").exists()


def test_text_shorter_than_a_window_is_refused(
    compressed: Callable[..., Output], tmp_path: Path
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Too short.", encoding="utf-8")
    ran = finetune(compressed("gptq"), tmp_path / "out", short, "--train", "lora")
    assert ran.code == 2 and "windows of 16" in ran.err


def test_another_original_is_refused(
    compressed: Callable[..., Output], tiny_model: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    made = compressed("gptq")
    other = Output(made.directory, tiny_model("llama", seed=3), made.method, made.ran)
    ran = finetune(other, tmp_path / "out", text, "--train", "lora")
    assert ran.code == 2 and "was not compressed from" in ran.err
    nowhere = run("finetune", made.directory, "-o", tmp_path / "out", "--train", "lora",
                  "--model", tmp_path / "none", "--dataset", text, *QUICK)  # fmt: skip
    assert nowhere.code == 2 and "--model" in nowhere.err


@pytest.mark.parametrize(
    "row",
    [{"text": "a", "x": "b", "y": "c"}, {"text": "a", "x": "b", "y": "c", "label": 2},
     {"text": "a", "x": "b", "label": 0}, {"text": 1, "x": "b", "y": "c", "label": 0}],
)  # fmt: skip
def test_task_lines_are_checked(
    row: dict[str, Any], compressed: Callable[..., Output], tmp_path: Path
) -> None:
    good = {"text": "a", "x": "b", "y": "c", "label": 0}
    data = write_rows(tmp_path / "task.jsonl", [good, good, row])
    ran = run(
        "finetune", compressed("gptq").directory, "-o", tmp_path / "out", "--scope", "model",
        "--loss", "task", "--train", "lora", "--dataset", data, "--text-field", "text",
        "--choice-field", "x", "--choice-field", "y",
    )  # fmt: skip
    assert ran.code == 2 and "line 3" in ran.err


def test_altered_tuning_records_are_noticed(
    compressed: Callable[..., Output], text: Path, tmp_path: Path
) -> None:
    from convex_caldera.storage.manifest import add_file

    made, out = compressed("gptq"), tmp_path / "out"
    parts = ("--train", "norms,dora", "--scope", "block", "--epochs", 1)
    assert finetune(made, out, text, *parts).code == 0
    report = json.loads((out / "convex_caldera/report.json").read_text())
    for change in (
        {"compressed_bytes": 1},
        {"compressed_bytes_before": 10**12},
        {"layers": ["nothing"]},
        {"tensors": []},
        {"more": 1},
    ):
        forged = shutil.copytree(out, tmp_path / "forged", dirs_exist_ok=True)
        altered = {**report, "finetuned": {**report["finetuned"], **change}}
        add_file(forged, "convex_caldera/report.json", [json.dumps(altered).encode()])
        assert not verify(forged, made.model).ok, change
