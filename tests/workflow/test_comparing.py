"""`bench` and `compare` on tiny models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.workflow.running import run

pytestmark = pytest.mark.slow

TASKS = {
    "wikitext2-token": {"task": "wikitext2", "metrics": ["token_perplexity"], "window": 16},
    "wikitext2-word": {"task": "wikitext2", "metrics": ["word_perplexity"], "window": None},
    "piqa": {"task": "piqa", "metrics": ["acc", "acc_norm"], "window": None},
}


def evaluation(path: Path, names: list[str]) -> Path:
    """The JSON of `eval --tasks`, with figures that are easy to recognize."""
    figures = {"token_perplexity": 12.5, "word_perplexity": 99.0, "acc": 0.625, "acc_norm": 0.75}
    models = [
        {
            "name": name, "file_bytes": None, "bits_per_weight": 16.0 / (1 + number),
            "bits_per_compressed_weight": None, "perplexity": 9.0, "kl": 0.1 * number,
            "top1_agreement": 0.9,
            "tasks": {
                key: {m: {"value": figures[m], "stderr": None} for m in task["metrics"]}
                for key, task in TASKS.items()
            },
        }
        for number, name in enumerate(names)
    ]  # fmt: skip
    path.write_text(json.dumps({"models": models, "tasks": TASKS, "text": "held-out"}))
    return path


def test_bench_times_models_beside_the_original(tiny_model: Callable, tmp_path: Path) -> None:
    sizes = ["--batches", "1,2", "--prompt-tokens", 8, "--new-tokens", 2, "--repeats", 1]
    ran = run("bench", tiny_model("llama"), *sizes, json_to=tmp_path / "bench.json")
    assert ran.code == 0, ran.err
    rows = ran.json["models"][0]["rows"]
    assert [row["batch"] for row in rows] == [1, 2]
    assert all(row["decode_tokens_per_second"] > 0 for row in rows)
    assert ran.json["models"][0]["weight_bytes"] > 0 and "1.00x" in ran.out
    for wrong, message in ((["--batches", "1,x"], "'1,x'"), (["--dtype", "int8"], "int8")):
        refused = run("bench", tiny_model("llama"), *wrong)
        assert refused.code == 2 and message in refused.err


def test_compare_writes_both_tables_and_one_page(compressed: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    outs = [compressed(method).directory for method in ("convex-caldera", "rtn")]
    file = evaluation(tmp_path / "eval.json", ["original", *map(str, outs)])
    ran = run(
        "compare", *outs, "--eval", file, "-o", tmp_path / "page",
        json_to=tmp_path / "compare.json",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert all(verdict["ok"] for verdict in ran.json["checked"].values())
    scores = (tmp_path / "page" / "mission-zero-shot.csv").read_text().splitlines()
    assert scores[0].startswith("Method,Avg Bits (all weights) ↓,Wiki2 (ppl per token @16) ↓,PiQA")
    assert "99.00" not in "".join(scores)  # per word and per token never share a column
    assert scores[1] == "original,16.00,12.50,62.5"
    efficiency = (tmp_path / "page" / "mission-efficiency.txt").read_text()
    assert "plan gap" in efficiency and "claims hold" in efficiency
    assert "none (one recipe for all layers)" in efficiency
    page = (tmp_path / "page" / "report.html").read_text()
    assert page.count('id="comparison"') == 1
    assert page.index('id="comparison"') < page.index('id="results"')


def test_compare_fails_where_a_claim_is_false(compressed: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    copy = tmp_path / "altered"
    shutil.copytree(compressed("rtn").directory, copy)
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    ran = run("compare", copy, "-o", tmp_path / "page")
    assert ran.code == 4 and "false: " in ran.out + ran.err


def test_generate_uses_the_chat_template_where_there_is_one(
    tiny_model: Callable, tmp_path: Path
) -> None:
    model = tmp_path / "chatty"
    shutil.copytree(tiny_model("llama"), model)
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}user: {{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %} bot:{% endif %}"
    )
    said = {
        option: run(
            "generate", model, "--prompt", "The dog", "--max-new-tokens", 6, *option,
            json_to=tmp_path / "said.json",
        ).json["text"]
        for option in ((), ("--chat",), ("--no-chat",))
    }  # fmt: skip
    assert said[()] == said["--chat",] != said["--no-chat",]
    plain = run(
        "generate", tiny_model("llama"), "--prompt", "The dog", "--max-new-tokens", 6,
        json_to=tmp_path / "plain.json",
    ).json["text"]  # fmt: skip
    assert plain == said["--no-chat",]
