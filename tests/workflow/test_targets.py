"""Curvature kinds, shrinkage, layers without gradients, and drift-corrected targets."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from convex_caldera.storage.read import open_container
from convex_caldera.workflow.sequential import windows_used
from tests.workflow.killing import start
from tests.workflow.running import NSAMPLES, SEQLEN, Ran, compress, run, snapshot

pytestmark = pytest.mark.slow

QTIP = ("--method", "qtip", "--bits", 6)
DRIFT = ("--targets", "drift-corrected")


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def small(tiny_model: Callable[..., Path]) -> Path:
    """One block, for runs of the default method."""
    return tiny_model("llama", num_hidden_layers=1)


def report_of(out: Path) -> dict:
    return open_container(out).report()


def plan_of(out: Path) -> dict:
    return json.loads((out / "convex_caldera" / "certificate.json").read_text())["plan"]


def done(ran: Ran, out: Path) -> dict:
    assert ran.code == 0, ran.err
    assert run("verify", out).code == 0
    return report_of(out)


@pytest.fixture(scope="module")
def drifted(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("drifted") / "out"
    done(compress(model, out, text, *QTIP, *DRIFT), out)
    return out


# --- drift-corrected targets ------------------------------------------------------------------


def test_drift_corrected_runs_say_so_and_search_a_blend_a_layer(drifted: Path, model: Path) -> None:
    report = report_of(drifted)
    assert report["targets"] == "drift-corrected"
    assert 'targets = "drift-corrected"' in (drifted / "convex_caldera" / "recipe.toml").read_text()
    layers = report["layers"]
    for name, layer in layers.items():
        drift = layer["drift"]
        assert 0.0 <= drift["factor"] <= 1.0 and drift["left"] <= drift["drift"], name
    first = layers["model.layers.0.self_attn.q_proj"]["drift"]
    assert first["drift"] == pytest.approx(0.0, abs=1e-9) and first["factor"] == 0.0
    assert any(layer["drift"]["factor"] > 0 for layer in layers.values())
    assert run("verify", drifted, "--model", model).code == 0


def test_first_readers_of_the_first_block_are_those_of_original_targets(
    drifted: Path, model: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done(compress(model, out, text, *QTIP), out)
    one, other = open_container(out), open_container(drifted)
    for name in ("q_proj", "k_proj", "v_proj"):
        layer = f"model.layers.0.self_attn.{name}"
        assert torch.equal(one.layer(layer).decode(), other.layer(layer).decode())
    layer = "model.layers.1.mlp.down_proj"
    assert not torch.equal(one.layer(layer).decode(), other.layer(layer).decode())


def test_drift_corrected_runs_resume_to_the_same_bytes(
    drifted: Path, model: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = [
        "compress", model, "-o", out, "--dataset", text, "--nsamples", NSAMPLES,
        "--seqlen", SEQLEN, *QTIP, *DRIFT, "--workers", 1,
    ]  # fmt: skip
    deaths = 0
    for moment in (9, 17, 10**6):
        process = start(arguments, die_at=moment)
        process.join()
        deaths += process.exitcode == -signal.SIGKILL
    assert deaths == 2 and process.exitcode == 0
    assert snapshot(out) == snapshot(drifted)


def test_plans_are_those_of_the_options_and_state_what_layers_cost_beside(
    small: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    menu = ("--bits", 6, "--bits-menu", "4,5", "--rank-menu", "0")
    done(compress(small, out, text, *menu, *DRIFT), out)
    certificate = json.loads((out / "convex_caldera" / "certificate.json").read_text())
    plan, layers = certificate["plan"], certificate["layers"]
    spent = sum(layer["option_loss"] * layer["held_out_scale"] for layer in layers.values())
    assert plan["distortion"] == pytest.approx(spent) and plan["bound"] <= plan["distortion"]
    assert (
        certificate["targets"] == "drift-corrected" and "fitted again" in certificate["statement"]
    )
    assert any(layer["loss"] != layer["option_loss"] for layer in layers.values())
    assert set(layers) == set(report_of(out)["layers"])


def test_the_default_method_corrects_drift_where_it_can_be_measured(
    small: Path, text: Path, tmp_path: Path
) -> None:
    menu = ("--bits", 6, "--bits-menu", "4,5", "--rank-menu", "0")
    corrected = done(compress(small, tmp_path / "a", text, *menu), tmp_path / "a")
    assert corrected["targets"] == "drift-corrected"
    assert corrected["held_out_kl"]["kl"] > 0
    plan = plan_of(tmp_path / "a")
    assert corrected["expected_kl"] == pytest.approx(0.8 * plan["distortion"])
    few = ("--nsamples", 2)  # too few to search a blend
    plain = done(compress(small, tmp_path / "b", text, *menu, *few), tmp_path / "b")
    assert plain["targets"] == "original"
    assert plain["expected_kl"] == plan_of(tmp_path / "b")["distortion"]
    other = done(
        compress(small, tmp_path / "c", text, "--method", "rtn", "--bits", 6), tmp_path / "c"
    )
    assert other["targets"] == "original"
    assert not {"held_out_kl", "expected_kl"} & set(other)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--method", "rtn"), ["drift-corrected targets need calibration", "--curvature input"]),
        (("--nsamples", 2), ["at least 3 calibration windows", "--nsamples"]),
        (("--method", "reallm"), ["reallm stores the options it has measured", "targets"]),
    ],
)
def test_targets_without_enough_text_are_refused(
    model: Path, text: Path, tmp_path: Path, options: tuple[object, ...], words: list[str]
) -> None:
    ran = compress(model, tmp_path / "out", text, *QTIP, *DRIFT, *options)
    assert ran.code == 2 and all(word in ran.err for word in words), ran.err


# --- curvature kinds --------------------------------------------------------------------------


def test_guided_runs_keep_the_rows_of_wide_layers_apart(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("convex_caldera.recipes.guided.LEAST_COLUMNS", 100)
    out = tmp_path / "out"
    guided = ("--curvature", "guided", "--shrinkage", "held-out")
    report = done(compress(model, out, text, *QTIP, *guided), out)
    assert report["curvature"] == "guided" and report["input_curvature_only"] == []
    assert set(report["shrinkage"]["scores"]) == {"input", "output", "towards_input"}
    for layer in report["layers"].values():
        (transform,) = layer["recipe"]["transforms"]
        assert transform["inputs"] and transform["outputs"] == (layer["shape"][1] < 100)
    assert (out / "convex_caldera" / "recipe.toml").read_text().count('"held-out"') == 1


def test_guided_plans_are_in_nats(small: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    menu = ("--bits", 7, "--bits-menu", "4,5", "--rank-menu", "0,2", "--curvature", "guided")
    done(compress(small, out, text, *menu), out)
    certificate = json.loads((out / "convex_caldera" / "certificate.json").read_text())
    assert certificate["unit"] == "nats" and certificate["curvature"] == "guided"


def test_shrinkage_changes_codes_but_not_what_losses_are_measured_under(
    model: Path, text: Path, tmp_path: Path
) -> None:
    outs = [tmp_path / name for name in ("plain", "smooth")]
    curvature = ("--curvature", "kronecker", "--hessians", tmp_path / "saved")
    plain, smooth = (
        done(compress(model, out, text, *QTIP, *curvature, "--shrinkage", shrinkage), out)
        for out, shrinkage in zip(outs, ("none", "0.2,0.4"), strict=True)
    )
    assert smooth["shrinkage"] == {"input": 0.2, "output": 0.4, "towards": "identity", "scores": {}}
    name = "model.layers.1.mlp.down_proj"
    assert plain["layers"][name]["loss"] != smooth["layers"][name]["loss"]
    assert run("verify", outs[1], "--model", model, "--hessians", tmp_path / "saved").code == 0


@pytest.mark.parametrize("shrinkage", ["much", "0.5", "0.1,2", "-0.1,0.1", "0.1,0.1,0.1", ""])
def test_bad_shrinkage_is_refused(model: Path, text: Path, tmp_path: Path, shrinkage: str) -> None:
    ran = compress(model, tmp_path / "out", text, *QTIP, f"--shrinkage={shrinkage}")
    assert ran.code == 2 and "such as 0.05,0.2" in ran.err


def test_shrinkage_cannot_be_searched_on_one_window(
    model: Path, text: Path, tmp_path: Path
) -> None:
    options = ("--curvature", "kronecker", "--shrinkage", "held-out", "--nsamples", 1)
    ran = compress(model, tmp_path / "out", text, *QTIP, *options)
    assert ran.code == 2 and "more than one window" in ran.err


# --- gradients that vanish --------------------------------------------------------------------

DEAD = "model.layers.1.self_attn.v_proj"


@pytest.fixture(scope="module")
def muted(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return without_attention(model, 1, tmp_path_factory.mktemp("muted") / "model")


def without_attention(model: Path, block: int, folder: Path) -> Path:
    """A copy whose attention output is zero in a block, so that nothing before it matters."""
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    weights[f"model.layers.{block}.self_attn.o_proj.weight"].zero_()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("kind", ["kronecker", "guided"])
def test_vanishing_gradients_are_one_clear_error(
    muted: Path, text: Path, tmp_path: Path, kind: str
) -> None:
    ran = compress(muted, tmp_path / "out", text, *QTIP, "--curvature", kind)
    assert ran.code == 4 and ran.err.count("error:") == 1
    assert "gradients vanish" in ran.err and "(3 such layers)" in ran.err
    assert "--curvature-fallback input" in ran.err and "--ignore" in ran.err


def test_vanishing_gradients_fall_back_if_the_recipe_says_so(
    muted: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = ("--curvature", "kronecker", "--curvature-fallback", "input")
    ran = compress(muted, out, text, *QTIP, *options)
    report = done(ran, out)
    assert "gradients vanish in 3 layers" in ran.out
    assert sorted(ran.json["input_curvature_only"]) == sorted(report["input_curvature_only"])
    assert sorted(n.rpartition(".")[2] for n in report["input_curvature_only"]) == [
        "k_proj", "q_proj", "v_proj",
    ]  # fmt: skip
    assert 'curvature_fallback = "input"' in (out / "convex_caldera" / "recipe.toml").read_text()
    losses = [layer["loss"] for layer in report["layers"].values()]
    assert report["layers"][DEAD]["loss"] == 0 and max(losses) > 0
    dead = open_container(out).layer(DEAD).decode()
    W = load_file(muted / "model.safetensors")[f"{DEAD}.weight"].float()
    assert float((dead - W).norm() / W.norm()) < 0.1


def test_plans_with_layers_that_fall_back_are_verified(
    small: Path, text: Path, tmp_path: Path
) -> None:
    model = without_attention(small, 0, tmp_path / "model")
    out, saved = tmp_path / "out", tmp_path / "saved"
    menu = ("--bits", 7, "--bits-menu", "4,5", "--rank-menu", "0")
    options = ("--curvature-fallback", "input", "--hessians", saved)
    report = done(compress(model, out, text, *menu, *options), out)
    assert "model.layers.0.self_attn.v_proj" in report["input_curvature_only"]
    ran = run("verify", out, "--model", model, "--hessians", saved)
    assert ran.code == 0, ran.out


def test_moments_are_taken_over_enough_windows_and_no_more() -> None:
    windows = torch.zeros(200, 256, dtype=torch.int64)
    assert len(windows_used(windows, 384)) == 64
    assert len(windows_used(windows, 2048)) == 128
    assert len(windows_used(windows[:2], 384)) == 2
    assert len(windows_used(torch.zeros(9, 65_536, dtype=torch.int64), 384)) == 3


def test_dry_runs_count_the_memory_of_both_models(model: Path, tmp_path: Path) -> None:
    plain = run("plan", model, *QTIP, json_to=tmp_path / "plain.json").json["memory"]
    drift = run("plan", model, *QTIP, *DRIFT, json_to=tmp_path / "drift.json").json["memory"]
    assert set(drift) - set(plain) == {"original and compressed block", "drift"}
    assert drift["drift"] > 4 * 128 * 64 * 2 * 48
