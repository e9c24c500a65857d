"""From calibration to verification: every weighted error and program is recomputed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.workflow.running import NSAMPLES, SEQLEN, Ran, compress, run, snapshot, write_text

pytestmark = pytest.mark.slow

LAYERS = 14
GPTQ = ("--method", "gptq", "--bits", 6, "--curvature", "kronecker")


def calibrate(model: Path, out: Path, text: Path, *options: object) -> Ran:
    return run(
        "calibrate", model, "-o", out, "--dataset", text, "--nsamples", NSAMPLES,
        "--seqlen", SEQLEN, *options, json_to=out.with_suffix(".json"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def curvature(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Kronecker curvature and the second moments of inputs, in one folder."""
    folder = tmp_path_factory.mktemp("curvature") / "saved"
    for kind in ("kronecker", "input"):
        ran = calibrate(model, folder, text, "--curvature", kind)
        assert ran.code == 0, ran.err
        assert ran.json["curvature"] == kind and ran.json["layers"] == LAYERS
    return folder


def test_default_method_is_verified_from_what_calibrate_saved(
    compressed: Any, curvature: Path, tmp_path: Path
) -> None:
    output = compressed("convex-caldera")
    ran = run(
        "verify", output.directory, "--model", output.model, "--hessians", curvature,
        json_to=tmp_path / "verify.json",
    )  # fmt: skip
    assert ran.code == 0, ran.out
    claims = {claim["name"]: claim["value"] for claim in ran.json["claims"]}
    assert claims["the statistics are those of this model"] == "kronecker curvature"
    assert f"{LAYERS} layers" in claims["every layer has the weighted error that it claims"]
    assert "gaps at most" in claims["every layer's low-rank program has the gap that it claims"]


def test_certificate_says_what_it_does_not_prove(compressed: Any) -> None:
    folder = compressed("convex-caldera").directory / "convex_caldera"
    text = (folder / "certificate.json").read_text()
    certificate = json.loads(text)
    assert text.splitlines()[1].startswith('  "statement": "Proves: ')
    statement = certificate["statement"]
    assert statement.startswith("Proves: ")
    for words in ("Does not prove:", "options that were not chosen", "held_out_scale"):
        assert words in statement
    plan = certificate["plan"]
    left = certificate["budget_bytes"] - certificate["reserved_bytes"]
    assert plan["budget_bits"] == 8 * left and plan["bits"] <= plan["budget_bits"]
    assert f"at most {plan['budget_bits']} bits" in statement
    assert certificate["reserved_bytes"] >= certificate["header_bytes"]
    for record in certificate["layers"].values():
        assert record["program"] is None or 0 <= record["program"]["gap"] < 1e-3


def test_saved_curvature_gives_the_same_bytes(
    model: Path, text: Path, curvature: Path, tmp_path: Path
) -> None:
    before = snapshot(curvature)
    for name, options in (("own", ()), ("reused", ("--hessians", curvature))):
        ran = compress(model, tmp_path / name, text, *GPTQ, *options)
        assert ran.code == 0, ran.err
    assert snapshot(tmp_path / "own") == snapshot(tmp_path / "reused")
    assert snapshot(curvature) == before
    ran = run("verify", tmp_path / "own", "--model", model, "--hessians", curvature)
    assert ran.code == 0, ran.out


def test_missing_statistics_are_collected_where_they_will_be_reused(
    model: Path, text: Path, curvature: Path, tmp_path: Path
) -> None:
    ran = compress(model, tmp_path / "out", text, *GPTQ, "--hessians", tmp_path / "kept")
    assert ran.code == 0, ran.err
    kept = snapshot(tmp_path / "kept")
    assert kept and kept.items() <= snapshot(curvature).items()


def test_curvature_of_another_text_seed_or_model_is_refused(
    tiny_model: Callable[..., Path], model: Path, text: Path, curvature: Path, tmp_path: Path
) -> None:
    other_text = write_text(tmp_path / "other.txt", seed=5)
    reuse = (*GPTQ, "--hessians", curvature)
    for name, arguments in {
        "tokens": (model, other_text),
        "seed": (model, text, "--seed", 7),
        "model": (tiny_model("llama", seed=3), text),
    }.items():
        model_, text_, *options = arguments
        ran = compress(model_, tmp_path / name, text_, *reuse, *options)
        assert ran.code == 2 and "holds the curvature of another" in ran.err, (name, ran.err)
    ran = calibrate(model, curvature, other_text, "--curvature", "kronecker")
    assert ran.code == 2 and "another tokens" in ran.err


def test_statistics_of_another_kind_name_the_remedy(
    compressed: Any, text: Path, tmp_path: Path
) -> None:
    output = compressed("convex-caldera")
    assert calibrate(output.model, tmp_path / "input", text).code == 0
    ran = run("verify", output.directory, "--model", output.model, "--hessians", tmp_path / "input")
    assert ran.code == 4 and "--curvature 'kronecker'" in ran.out


def test_changed_curvature_is_no_proof(compressed: Any, curvature: Path, tmp_path: Path) -> None:
    output, changed = compressed("convex-caldera"), tmp_path / "changed"
    shutil.copytree(curvature, changed)
    file = changed / "curvature-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-4] ^= 1
    file.write_bytes(content)
    ran = run("verify", output.directory, "--model", output.model, "--hessians", changed)
    assert ran.code == 4 and "SHA-256 differs" in ran.out


def test_calibrate_has_nothing_to_save_without_data(
    model: Path, text: Path, tmp_path: Path
) -> None:
    ran = calibrate(model, tmp_path / "none", text, "--curvature", "none")
    assert ran.code == 2 and "input or kronecker" in ran.err
    ran = compress(model, tmp_path / "out", text, "--method", "rtn", "--hessians", tmp_path)
    assert ran.code == 2 and "--hessians" in ran.err
