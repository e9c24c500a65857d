"""Curvature measured again on the compressed model: kept only where it costs less held out."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from convex_caldera.errors import ModelError
from convex_caldera.storage.read import open_container
from convex_caldera.workflow.substituted import exchanged
from tests.workflow.killing import start
from tests.workflow.running import NSAMPLES, SEQLEN, compress, json_path, run, snapshot

QTIP = ("--method", "qtip", "--bits", 2.6, "--curvature", "kronecker")
AGAIN = (*QTIP, "--targets", "drift-corrected", "--remeasure")


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def remeasured(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("remeasured") / "out"
    ran = compress(model, out, text, *AGAIN)
    assert ran.code == 0, ran.err
    return out


def test_the_round_that_costs_less_held_out_is_what_is_stored(remeasured: Path) -> None:
    report = open_container(remeasured).report()
    rounds = report["remeasured"]
    kept = rounds["kept"]
    assert rounds[kept]["kl"] == min(rounds["first"]["kl"], rounds["second"]["kl"])
    assert rounds["first"]["kl"] != rounds["second"]["kl"]
    assert report["held_out_kl"]["kl"] == pytest.approx(rounds[kept]["kl"], rel=1e-5)
    summary = json.loads(json_path(remeasured).read_text())
    assert summary["remeasured"] == rounds
    assert run("verify", remeasured).code == 0


def test_the_first_round_is_what_a_run_without_is(
    remeasured: Path, model: Path, text: Path, tmp_path: Path
) -> None:
    once = tmp_path / "once"
    ran = compress(model, once, text, *QTIP, "--targets", "drift-corrected")
    assert ran.code == 0, ran.err
    rounds = open_container(remeasured).report()["remeasured"]
    held_out = open_container(once).report()["held_out_kl"]
    assert held_out["kl"] == pytest.approx(rounds["first"]["kl"], rel=1e-5)


@pytest.mark.slow
def test_a_run_cut_short_in_either_round_ends_with_the_same_bytes(
    remeasured: Path, model: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = [
        "compress", model, "-o", out, "--dataset", text, "--nsamples", NSAMPLES,
        "--seqlen", SEQLEN, *AGAIN, "--workers", 1,
    ]  # fmt: skip
    deaths = 0
    for moment in (17, 25, 25, 25, 10**6):
        process = start(arguments, die_at=moment)
        process.join()
        deaths += process.exitcode == -signal.SIGKILL
    assert deaths == 4 and process.exitcode == 0
    assert snapshot(out) == snapshot(remeasured)


@pytest.mark.parametrize(
    "options",
    [
        ("--method", "gptq", "--bits", 4),
        ("--method", "rtn", "--bits", 4),
        (*QTIP, "--targets", "original"),
        ("--method", "qtip", "--bits", 4, "--curvature", "input", "--targets", "drift-corrected"),
    ],
)
def test_without_gradients_or_order_there_is_nothing_to_measure_again(
    options: tuple[object, ...], model: Path, text: Path, tmp_path: Path
) -> None:
    ran = compress(model, tmp_path / "out", text, *options, "--remeasure")
    assert ran.code != 0 and "--remeasure" in ran.err
    assert not (tmp_path / "out").exists()


def test_exchanged_weights_are_given_back_to_the_last_bit() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 4))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with exchanged(model, {"0": torch.ones(2, 3)}):
        assert torch.equal(model[0].weight, torch.ones(2, 3))
    unknown = {"0": torch.ones(2, 3), "9": torch.ones(2, 2)}
    with pytest.raises(ModelError, match="no such weight"), exchanged(model, unknown):
        pass
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
