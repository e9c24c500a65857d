"""Measuring adds its files to a directory, twice the same, and leaves it verified."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from convex_caldera.certify import verify
from convex_caldera.errors import ModelError
from convex_caldera.evaluate.compare import Candidate, evaluate
from convex_caldera.models.original import load_original
from convex_caldera.models.tokenizer import load_tokenizer
from convex_caldera.report.read import read_run
from convex_caldera.storage.read import open_container
from convex_caldera.workflow.measuring import measure_directory

FILES = ("spectra.json", "measured.json", "landscape.json")
WINDOW, TOKENS = 64, 256


@pytest.fixture(scope="module")
def measured(compressed, held_out, text, tmp_path_factory) -> tuple[Path, Path]:
    """A measured copy of a directory, and its original."""
    output = compressed("gptq")
    copy = tmp_path_factory.mktemp("measured") / "out"
    shutil.copytree(output.directory, copy)
    measure_directory(
        copy, model=str(output.model), dataset=str(text), text=str(held_out), window=WINDOW,
        max_tokens=TOKENS,
    )  # fmt: skip
    return copy, output.model


def test_measured_directory_verifies_and_is_read(measured):
    directory, _ = measured
    assert verify(directory).ok
    run = read_run(directory)
    names = set(open_container(directory).layers)
    assert {spectra.name for spectra in run.spectra} == names
    assert {row.name for row in run.layers if row.measured_kl is not None} == names
    assert run.measured.tokens <= TOKENS
    assert run.measured.text == "held-out.txt"
    worst = max((row for row in run.layers), key=lambda row: row.measured_kl or 0.0)
    assert worst.name in run.landscape.title


def test_landscape_costs_more_bits_for_less_error(measured):
    directory, _ = measured
    land = read_run(directory).landscape
    assert land.ranks[0] == 0 and len(land.error) == len(land.ranks)
    for errors, bits in zip(land.error, land.stored_bits, strict=True):
        assert list(bits) == sorted(set(bits))
        assert errors[0] > errors[-1] > 0


def test_measuring_again_gives_the_same_bytes(measured, held_out, text):
    directory, model = measured
    before = [(directory / "convex_caldera" / name).read_bytes() for name in FILES]
    measure_directory(
        directory, model=str(model), dataset=str(text), text=str(held_out), window=WINDOW,
        max_tokens=TOKENS, workers=1,
    )  # fmt: skip
    assert [(directory / "convex_caldera" / name).read_bytes() for name in FILES] == before


def test_single_layer_is_the_model_with_that_weight(measured, held_out):
    directory, model = measured
    record = json.loads((directory / "convex_caldera/measured.json").read_text())["measured"]
    name = sorted(record["layers"])[0]
    altered = load_original(model, torch.float32, "cpu")
    weight = altered.get_parameter(f"{name}.weight")
    with torch.no_grad():
        weight.copy_(open_container(directory).layer(name).decode())
    original = load_original(model, torch.float32, "cpu")
    scores = evaluate(
        [Candidate("original", lambda: original), Candidate("altered", lambda: altered)],
        held_out.read_text(), load_tokenizer(model), window=WINDOW, max_tokens=TOKENS,
    )  # fmt: skip
    assert scores[1].kl == pytest.approx(record["layers"][name]["kl"], rel=1e-4, abs=1e-9)


def test_measuring_against_another_model_is_refused(measured, tiny_model, held_out, text):
    directory, _ = measured
    other = tiny_model(hidden_size=64, seed=9)
    with pytest.raises(ModelError, match=r"in the original|no such layer"):
        measure_directory(directory, model=str(other), dataset=str(text), text=str(held_out))
