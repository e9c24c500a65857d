"""Staged configurations: strict, consistent, resumable, with the same bytes as compress."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from convex_caldera.errors import ConvexCalderaError, InterruptedRunError, RecipeError, ResumeError
from convex_caldera.storage.manifest import MANIFEST
from convex_caldera.workflow import stages as stages_module
from convex_caldera.workflow.compress import compress_to
from convex_caldera.workflow.settings import read_settings
from convex_caldera.workflow.stage_config import (
    layer_pattern,
    make_config,
    overridden,
    read_document,
    settings_of,
    without_effect,
)
from convex_caldera.workflow.stages import Stages
from convex_caldera.workflow.templates import find, names
from tests.workflow.staging import config, document, short_texts  # noqa: F401

LAYERS = 14


def manifest(directory: Path) -> dict[str, Any]:
    return json.loads((directory / MANIFEST).read_text())["files"]


# --- configuration --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lqer", "lqer_int"])
def test_shipped_configurations_compile(name: str) -> None:
    settings = settings_of(make_config(read_document(find(name))))
    assert settings.method == "l2qer" and settings.rank == 32
    shown = (settings.format, settings.factor_format, settings.activations)
    assert (
        shown
        == {
            "lqer": ("mxint4-legacy/16", "mxint8-legacy/16", "mxint8-legacy/16"),
            "lqer_int": ("int4/128", "float16", None),
        }[name]
    )


@pytest.mark.parametrize(
    ("override", "one", "other"),
    [
        ("l_config.linear.rank=5", "approximate.default.rank = 4", "l_config.linear.rank = 5"),
        (
            "q_config.linear.w_quantizer.width=3",
            "approximate.default.W_quantizer.width = 4",
            "q_config.linear.w_quantizer.width = 3",
        ),
        (
            "q_config.linear.w_quantizer.block_size=[-1, -1]",
            "approximate.default.W_quantizer.block_size",
            "q_config.linear.w_quantizer.block_size",
        ),
        (
            "approximate.default.B_quantizer.width=6",
            "approximate.default.A_quantizer.width = 8",
            "approximate.default.B_quantizer.width = 6",
        ),
        (
            "q_config.matmul.w_quantizer.width=6",
            "q_config.matmul.x_quantizer.width = 8",
            "q_config.matmul.w_quantizer.width = 6",
        ),
        ("approximate.chunk_idx=1", "approximate.chunk_idx", "approximate.chunk_size"),
        (
            "enable_harness_downstream_evaluation=true",
            "enable_harness_downstream_evaluation",
            "evaluate.harness_downstream",
        ),
    ],
)
def test_a_contradiction_names_both_keys(override: str, one: str, other: str) -> None:
    changes = ["evaluate.harness_downstream=NA"] if "harness" in override else []
    with pytest.raises(RecipeError) as caught:
        make_config(document(*changes, override))
    assert one in str(caught.value) and other in str(caught.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("profile.num_sample=3", "did you mean num_samples"),
        ("approximate.default.rank=-1", "approximate.default.rank"),
        ('approximate.default.rank="4"', "approximate.default.rank"),
        ("approximate.name=lora", "approximate.name"),
        ("evaluate.harness_downstream.num_fewshot=5", "num_fewshot"),
        ("enable_wandb=true", "enable_wandb"),
        ("model_name.other=1", "model_name is a value"),
        ("nonsense", "section.key=value"),
        ("profile.num_samples=:ast:(", "no literal"),
    ],
)
def test_unknown_keys_and_wrong_values_are_refused(override: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        make_config(document(override))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["W.width=9"], "width"),
        (["W.width=NA"], "W_quantizer.width is missing"),
        (["W.block_size=[4, 16]"], "one axis"),
        (["W.block_size=[-1, -1]"], "one block for all"),
        (["W.exponent_bias=7"], "exponent_bias"),
        (["W.name=int"], "no exponent"),
        (["W.name=passthrough"], "passes through"),
    ],
)
def test_formats_that_do_not_exist_are_refused(overrides: list[str], said: str) -> None:
    both = ("approximate.default.W_quantizer", "q_config.linear.w_quantizer")
    changes = [place + text[1:] for place in both for text in overrides]
    with pytest.raises(RecipeError, match=said):
        settings_of(make_config(document(*changes)))


def test_overrides_of_both_forms_and_absent_values() -> None:
    changed = overridden(
        {"a": {"b": 1, "c": 2}}, ["--a:b=7", "a.d.e=[1, 16]", "a.c=NA", "x=text", "y=:ast:0"]
    )
    assert changed == {"a": {"b": 7, "d": {"e": [1, 16]}}, "x": "text", "y": 0}


def test_keys_without_effect_are_named() -> None:
    found = without_effect(document("profile.batch_size=2", "evaluate.dtype=float16"))
    assert found == ["profile.batch_size", "evaluate.dtype"]


def test_patterns_of_lqer_fit_layers() -> None:
    pattern = layer_pattern(r"model\.layers\.[0-9]+\.self_attn\.(k|q)_proj\.weight")
    assert pattern == r"re:^(?:model\.layers\.[0-9]+\.self_attn\.(k|q)_proj)$"


# --- stages ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """All stages but the tasks, in chunks of five layers."""
    out = tmp_path_factory.mktemp("stages") / "out"
    made = config(tiny_model(), "approximate.chunk_size=5")
    return out, Stages(made, out, workers=1).run()


def test_all_stages_leave_their_results(finished: tuple[Path, dict]) -> None:
    out, results = finished
    assert list(results) == ["profile", "approximate", "quantize", "perplexity"]
    assert results["approximate"]["layers"] == LAYERS and results["approximate"]["chunks"] == 3
    assert results["approximate"]["precision"] == "W4A8"
    assert results["perplexity"]["kl"] > 0
    assert sorted(p.name for p in out.iterdir()) == [
        "config.toml", "model", "perplexity.json", "profile", "stages.json",
    ]  # fmt: skip


def test_chunks_and_compress_write_the_same_bytes(
    finished: tuple[Path, dict], tmp_path: Path
) -> None:
    """recipe.toml of the staged run is enough to make its directory again, to the byte."""
    out, _ = finished
    recipe = out / "model" / "convex_caldera" / "recipe.toml"
    made = make_config(read_document(out / "config.toml"))
    whole = {"model": made.model_name, "dataset": made.profile.dataset}  # recipes hide folders
    compress_to(read_settings(recipe).model_copy(update=whole), tmp_path / "direct", workers=1)
    staged, direct = manifest(out / "model"), manifest(tmp_path / "direct")
    weights = [name for name in staged if name.endswith(".safetensors")]
    assert weights and all(staged[name] == direct[name] for name in weights)
    assert staged["config.json"] == direct["config.json"]


def test_finished_stages_are_not_redone(
    finished: tuple[Path, dict], tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, results = finished
    monkeypatch.setattr(stages_module, "prepare", None)
    monkeypatch.setattr(stages_module, "evaluate_models", None)
    again = Stages(config(tiny_model(), "approximate.chunk_size=5"), out).run()
    assert again == results and list(again) == list(results)


def test_another_configuration_is_refused_unless_told(
    finished: tuple[Path, dict], tiny_model: Any, tmp_path: Path
) -> None:
    out, _ = finished
    with pytest.raises(ResumeError, match="overwrite_checkpoint"):
        Stages(config(tiny_model(), "profile.seed=7"), out).run()
    (tmp_path / "file").write_text("")
    with pytest.raises(ResumeError, match="not empty"):
        Stages(config(tiny_model()), tmp_path).run()


def test_another_evaluation_is_made_on_the_same_model(
    finished: tuple[Path, dict], tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, results = finished
    shutil.copytree(out, out.with_name("copy"))
    monkeypatch.setattr(stages_module, "prepare", None)
    changed = config(tiny_model(), "approximate.chunk_size=5", "evaluate.perplexity.num_samples=2")
    again = Stages(changed, out.with_name("copy")).run()
    assert again["perplexity"]["kl"] != results["perplexity"]["kl"]
    assert again["quantize"] == results["quantize"]


@pytest.mark.parametrize("content", ["{", "[]", '{"fingerprint": "x"}'])
def test_a_damaged_record_is_refused(tiny_model: Any, tmp_path: Path, content: str) -> None:
    (tmp_path / "stages.json").write_text(content)
    with pytest.raises(ResumeError, match="begin anew"):
        Stages(config(tiny_model()), tmp_path).run()


def test_chunks_of_several_processes_wait_for_each_other(tiny_model: Any, tmp_path: Path) -> None:
    model = tiny_model("llama", num_hidden_layers=1)

    def chunk(index: int, *more: str) -> dict[str, Any]:
        made = config(
            model, "approximate.chunk_size=4", f"approximate.chunk_idx={index}",
            "approximate.name=lqer-svd", "enable_perplexity_evaluation=false", *more,
        )  # fmt: skip
        return Stages(made, tmp_path / "out", workers=1).run()

    assert "approximate" not in chunk(1)
    assert not (tmp_path / "out" / "model").exists()
    results = chunk(0)
    assert results["quantize"]["output"] == "model"
    made = config(model, "approximate.chunk_size=4", "approximate.chunk_idx=2")
    with pytest.raises(RecipeError, match=r"chunk_idx = 2.*2 chunks of 7"):
        Stages(made, tmp_path / "other").run()


def test_a_stopped_run_goes_on_where_it_was(
    tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop:
        done = 0

        def start(self, stage: str, total: int) -> None: ...

        def advance(self, note: str = "") -> None:
            Stop.done += 1
            if Stop.done == 4:
                raise KeyboardInterrupt

    model = tiny_model("llama", num_hidden_layers=1)
    made = config(model, "approximate.name=lqer-svd", "enable_perplexity_evaluation=false")
    with pytest.raises(InterruptedRunError, match="approximate"):
        Stages(made, tmp_path / "out", progress=Stop(), workers=1).run()
    assert (tmp_path / "out" / "approximate").is_dir()
    results = Stages(made, tmp_path / "out", workers=1).run()
    whole = Stages(made, tmp_path / "whole", workers=1).run()
    assert Stop.done == 4 and results["quantize"]["file_bytes"] == whole["quantize"]["file_bytes"]
    assert manifest(tmp_path / "out" / "model") == manifest(tmp_path / "whole" / "model")


def test_patterns_give_layers_formats_of_their_own(tiny_model: Any, tmp_path: Path) -> None:
    changed = document("enable_perplexity_evaluation=false", "approximate.name=lqer-svd")
    wide = json.loads(json.dumps(changed["approximate"]["default"]))
    wide["rank"], wide["W_quantizer"]["width"] = 2, 6
    changed["approximate"]["approximator"] = {
        r"model\.layers\.[0-9]+\.mlp\..*\.weight": "default",
        r"model\.layers\.[0-9]+\.self_attn\..*\.weight": wide,
    }
    changed["model_name"] = str(tiny_model())
    Stages(make_config(changed), tmp_path / "out", workers=1).run()
    report = json.loads((tmp_path / "out/model/convex_caldera/report.json").read_text())
    for name, record in report["layers"].items():
        quantize, low_rank = record["recipe"]["steps"]
        expected = (6, 2) if "self_attn" in name else (4, 4)
        assert (quantize["quantizer"]["bits"], low_rank["rank"]) == expected
    changed["approximate"]["approximator"]["model.*"] = "default"
    with pytest.raises(RecipeError, match="exactly one pattern"):
        Stages(make_config(changed), tmp_path / "twice").run()


def test_stages_that_lack_an_earlier_one_say_so(tiny_model: Any, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="enable_profiling"):
        Stages(config(tiny_model(), "enable_profiling=false"), tmp_path / "a").run()
    off = ("enable_profiling=false", "enable_approximation=false")
    with pytest.raises(RecipeError, match="approximate and quantize first"):
        Stages(config(tiny_model(), *off), tmp_path / "b").run()


def test_missing_task_runner_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "convex_caldera.workflow.zero_shot", None)
    options = {"datasets": ["piqa"], "task_data": [], "limit": None, "batch_size": None}
    with pytest.raises(ConvexCalderaError, match=r"convex-caldera\[eval\]"):
        stages_module.run_tasks(["a", "b"], options, Path("x"), "cpu")


def test_every_shipped_file_is_named() -> None:
    assert {"lqer", "lqer_int"} <= set(names())
    with pytest.raises(RecipeError, match="sweep_lqer_act"):
        find("nothing")
