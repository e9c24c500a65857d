"""Work is lost at most one file deep: killed, interrupted or out of disk, a run can go on.

The moments are those at which a file becomes durable, in seeded random order; what is left of
the run must lead to the very bytes of an undisturbed one.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.workflow.killing import at_file, finished_layers, start, wait_for
from tests.workflow.running import NSAMPLES, SEQLEN, compress, run, snapshot, write_text

pytestmark = pytest.mark.slow

LAYERS = 14
GPTQ = ("--method", "gptq", "--bits", 6)


def arguments(model: Path, out: Path, text: Path, *options: object) -> list[object]:
    return [
        "compress", model, "-o", out, "--dataset", text, "--nsamples", NSAMPLES,
        "--seqlen", SEQLEN, *options,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def undisturbed(
    model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, str], int]:
    """Hashes of the finished files, and how many files were written on the way."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    with at_file(None, lambda: None) as files:
        assert compress(model, out, text, *GPTQ).code == 0
    assert files[0] > 2 * LAYERS
    return snapshot(out), files[0]


def full_disk() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# --- kill -9 --------------------------------------------------------------------------------


def test_killed_runs_resume_to_the_same_bytes(
    model: Path, text: Path, tmp_path: Path, undisturbed: tuple[dict[str, str], int]
) -> None:
    expected, files = undisturbed
    out, dice, deaths = tmp_path / "out", random.Random(5), 0
    while True:
        process = start(arguments(model, out, text, *GPTQ), die_at=dice.randint(1, files // 2))
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL and finished_layers(out) <= LAYERS
        deaths += 1
    assert deaths >= 3
    assert snapshot(out) == expected


def test_killed_allocations_resume_to_the_same_bytes(
    tiny_model: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    """While measuring and while storing, in one run after another."""
    model, out = tiny_model("llama", num_hidden_layers=1), tmp_path / "out"
    # The default method with a small menu.
    options = ("--bits", 6, "--rank", 0, "--ignore", "mlp", "--pin", "k_proj=bits:4")
    with at_file(None, lambda: None) as files:
        assert compress(model, tmp_path / "whole", text, *options).code == 0
    for share in (0.3, 0.3, 0.3):
        process = start(arguments(model, out, text, *options), die_at=round(share * files[0]))
        process.join()
        assert process.exitcode == -signal.SIGKILL and (out / ".partial").is_dir()
    assert run(*arguments(model, out, text, *options)).code == 0
    assert snapshot(out) == snapshot(tmp_path / "whole")


def test_killed_at_any_time(
    model: Path, text: Path, tmp_path: Path, undisturbed: tuple[dict[str, str], int]
) -> None:
    """By another process, between any two instructions."""
    out, dice = tmp_path / "out", random.Random(7)
    for _ in range(2):
        process = start(arguments(model, out, text, *GPTQ), slow=0.03)
        wanted = finished_layers(out) + dice.randint(1, 4)
        wait_for(lambda least=wanted: finished_layers(out) >= least, process)
        process.kill()
        process.join()
    ran = compress(model, out, text, *GPTQ)
    assert ran.code == 0 and ran.json["resumed_layers"] >= 2
    assert snapshot(out) == undisturbed[0]


# --- Ctrl-C ---------------------------------------------------------------------------------


def test_an_interrupt_is_code_5_and_resumable(
    model: Path, text: Path, tmp_path: Path, undisturbed: tuple[dict[str, str], int]
) -> None:
    out = tmp_path / "out"
    process = start(arguments(model, out, text, *GPTQ), slow=0.05)
    wait_for(lambda: finished_layers(out) >= 3, process)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode == 5
    ran = compress(model, out, text, *GPTQ)
    assert ran.code == 0 and 3 <= ran.json["resumed_layers"] < LAYERS
    assert snapshot(out) == undisturbed[0]


def test_an_interrupt_says_how_to_go_on(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*details: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("convex_caldera.workflow.fitting.side_by_side", interrupt)
    ran = compress(model, tmp_path / "out", text, *GPTQ)
    assert ran.code == 5
    assert "0 of 14 layers finished; run the same command again" in ran.err
    monkeypatch.setattr("convex_caldera.workflow.compress.prepare", interrupt)
    assert compress(model, tmp_path / "other", text, *GPTQ).code == 5


# --- a full disk ----------------------------------------------------------------------------


def test_a_full_disk_loses_nothing(
    model: Path, text: Path, tmp_path: Path, undisturbed: tuple[dict[str, str], int]
) -> None:
    expected, files = undisturbed
    for number in sorted(random.Random(11).sample(range(1, files + 1), 4)):
        out = tmp_path / f"full-at-{number}"
        with at_file(number, full_disk):
            ran = compress(model, out, text, *GPTQ)
        assert ran.code == 5, (number, ran.err)
        assert "disk full while writing" in ran.err and "run the same command again" in ran.err
        kept = finished_layers(out)
        ran = compress(model, out, text, *GPTQ)
        assert ran.code == 0 and ran.json["resumed_layers"] == kept
        assert snapshot(out) == expected


def test_an_allocation_on_a_full_disk(
    tiny_model: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    with at_file(30, full_disk):
        ran = compress(model, tmp_path / "out", text, "--bits", 6, "--rank", 0)
    assert ran.code == 5 and "disk full while writing" in ran.err


@contextmanager
def small_file_system(place: Path) -> Iterator[None]:
    place.mkdir()
    if os.system(f"mount -t tmpfs -o size=260k none {place} 2>/dev/null"):
        pytest.skip("mounting a file system takes more rights")
    try:
        yield
    finally:
        os.system(f"umount {place}")


def test_a_file_system_that_is_full(model: Path, text: Path, tmp_path: Path) -> None:
    """Layers fit, the finished directory does not."""
    with small_file_system(tmp_path / "small"):
        out = tmp_path / "small" / "out"
        ran = compress(model, out, text, *GPTQ)
        assert ran.code == 5, ran.err
        assert "are free" in ran.err or "disk full" in ran.err
        assert finished_layers(out) > 0


# --- what must not be continued -------------------------------------------------------------


@pytest.fixture
def partial(model: Path, text: Path, tmp_path: Path) -> Path:
    """A run that stopped in the middle of its layers."""
    with at_file(20, full_disk):
        assert compress(model, tmp_path / "out", text, *GPTQ).code == 5
    assert finished_layers(tmp_path / "out") > 0
    return tmp_path / "out"


def test_another_run_is_not_continued(
    model: Path, text: Path, tmp_path: Path, partial: Path, undisturbed: Any
) -> None:
    other_text = write_text(tmp_path / "other.txt", seed=2)
    other_model = tmp_path / "other-model"
    shutil.copytree(model, other_model)
    content = bytearray((other_model / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (other_model / "model.safetensors").write_bytes(content)
    before = snapshot(partial)
    for changed, where in (
        (arguments(model, partial, other_text, *GPTQ), "another text"),
        (arguments(other_model, partial, text, *GPTQ), "another model"),
        (arguments(model, partial, text, "--method", "gptq", "--bits", 5), "another recipe"),
        (arguments(model, partial, text, *GPTQ, "--seed", 3), "another"),
    ):
        ran = run(*changed)
        assert ran.code == 2 and where in ran.err and "remove .partial" in ran.err
    assert snapshot(partial) == before
    assert compress(model, partial, text, *GPTQ).code == 0
    assert snapshot(partial) == undisturbed[0]


def test_damaged_work_is_done_again(
    model: Path, text: Path, partial: Path, undisturbed: Any
) -> None:
    kept = finished_layers(partial)
    layer = sorted((partial / ".partial" / "layers").glob("*.safetensors"))[0]
    content = bytearray(layer.read_bytes())
    content[len(content) // 2] ^= 1
    layer.write_bytes(content)
    with open(partial / ".partial" / "layers.jsonl", "ab") as journal:
        journal.write(b'{"name": "torn')
    ran = compress(model, partial, text, *GPTQ)
    assert ran.code == 0 and ran.json["resumed_layers"] == kept - 1
    assert snapshot(partial) == undisturbed[0]


def test_two_runs_do_not_share_a_directory(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(arguments(model, out, text, *GPTQ), slow=0.2)
    wait_for(lambda: finished_layers(out) >= 1, process)
    ran = compress(model, out, text, *GPTQ)
    process.kill()
    process.join()
    assert ran.code == 2 and "another process is at work" in ran.err


def test_a_finished_output_is_not_overwritten(compressed: Any, text: Path) -> None:
    output = compressed("gptq")
    before = snapshot(output.directory)
    ran = compress(output.model, output.directory, text, *GPTQ)
    assert ran.code == 2 and "is not empty" in ran.err
    assert snapshot(output.directory) == before
