"""T11: every command does its work on a tiny Llama and writes the JSON that scripts rely on."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from convex_caldera.recipes.table import METHODS
from convex_caldera.runtime.load import load
from tests.examples import first
from tests.tiny_models import SENTENCES
from tests.workflow.fixtures import BITS
from tests.workflow.running import NSAMPLES, SEQLEN, run, shard_bytes

WEIGHTS = 46_080  # of the fourteen linear layers of the tiny Llama
LAYERS = 14
COMPRESS_KEYS = {
    "file_bytes",
    "bits_per_compressed_weight",
    "bits_per_weight",
    "seconds",
    "peak_memory_bytes",
}
# Of any layer at so many bits on a random model; decoders take most of the bytes of a tiny one.
# convex-caldera minimises their sum in nats, not any one of them.
LARGEST_LOSS = {"reallm": 0.5, "reallm-ae": 0.5, "convex-caldera": 0.3}
# How long their codes become is known when they are written; the plan counts the most.
ENTROPY_CODED = ("scl-ecsq", "scl-ecvq", "reallm-ae")
EVAL_KEYS = {
    "name",
    "file_bytes",
    "bits_per_compressed_weight",
    "perplexity",
    "perplexity_stderr",
    "bits_per_byte",
    "kl",
    "top1_agreement",
}


# The methods of one family run the same code; one of each is quick enough for every commit.
QUICK = {"convex-caldera", "quip-sharp", "gptq", "rtn", "scl-lloyd-max"}
EVERY_METHOD = pytest.mark.parametrize(
    "method",
    [m if m in QUICK else pytest.param(m, marks=pytest.mark.slow) for m in METHODS],
)


@EVERY_METHOD
def test_compress_states_what_is_on_disk(compressed: Any, method: str) -> None:
    output = compressed(method)
    record, sizes = output.ran.json, shard_bytes(output.directory)
    assert set(record) >= COMPRESS_KEYS
    assert record["method"] == method
    assert record["file_bytes"] == sizes["all"]
    assert record["bits_per_compressed_weight"] == 8 * sizes["compressed"] / WEIGHTS <= BITS
    parameters = sum(t.numel() for t in load_file(output.model / "model.safetensors").values())
    assert record["bits_per_weight"] == 8 * sizes["all"] / parameters
    assert record["compressed_weights"] == WEIGHTS and record["num_layers"] == LAYERS
    assert 0 < record["seconds"] and 1e8 < record["peak_memory_bytes"] < 1e11
    assert f"{sizes['all']:,} bytes" in output.ran.out


@EVERY_METHOD
def test_verify_accepts_what_compress_wrote(compressed: Any, method: str, tmp_path: Path) -> None:
    ran = run("verify", compressed(method).directory, json_to=tmp_path / "verify.json")
    assert ran.code == 0, ran.out
    assert ran.json["ok"] is True
    assert len(ran.json["claims"]) >= 3
    for claim in ran.json["claims"]:
        assert set(claim) >= {"name", "holds", "value"} and claim["holds"] is True


def test_an_allocating_method_states_its_plan(compressed: Any) -> None:
    record = compressed("convex-caldera").ran.json
    assert record["budget_bytes"] == WEIGHTS * BITS // 8
    assert record["plan_gap"] >= 0 and record["surrogate_gap"] >= 0
    assert record["bound"] <= record["distortion"] and record["price"] >= 0
    assert len(record["layers"]) == LAYERS
    for layer in record["layers"].values():
        assert set(layer) >= {"bits", "rank", "price", "distortion"}


@EVERY_METHOD
def test_plan_foretells_the_bytes(compressed: Any, method: str, tmp_path: Path) -> None:
    output = compressed(method)
    ran = run(
        "plan", output.model, "--method", method, "--bits", BITS, "--layers",
        "--nsamples", NSAMPLES, "--seqlen", SEQLEN, json_to=tmp_path / "plan.json",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert set(ran.json) >= {"file_bytes", "peak_memory_bytes", "disk_bytes_while_running"}
    assert [set(layer) >= {"name", "shape", "bits", "rank"} for layer in ran.json["layers"]] == (
        [True] * LAYERS
    )
    assert ran.json["compressed_bytes"] <= ran.json["budget_bytes"] == WEIGHTS * BITS // 8
    planned, stored = ran.json["file_bytes"], output.ran.json["file_bytes"]
    if method in ENTROPY_CODED:
        assert planned >= stored
    elif not METHODS[method].allocates:  # a plan from measurements may be any within budget
        assert planned == stored
    assert "model.layers.1.mlp.down_proj" in ran.out


def test_plan_reads_no_weight(compressed: Any, tmp_path: Path) -> None:
    """The file's header is enough: every tensor may be nonsense."""
    model = tmp_path / "model"
    shutil.copytree(compressed("rtn").model, model)
    file = model / "model.safetensors"
    content = bytearray(file.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    content[header:] = b"\xff" * (len(content) - header)  # all NaN
    file.write_bytes(content)
    ran = run("plan", model, "--method", "rtn", "--bits", BITS, json_to=tmp_path / "plan.json")
    assert ran.code == 0 and ran.json["file_bytes"] == compressed("rtn").ran.json["file_bytes"]


def test_eval_compares_with_the_original(compressed: Any, held_out: Path, tmp_path: Path) -> None:
    good, bad = compressed("gptq"), compressed("quip-sharp")
    ran = run(
        "eval", good.model, good.directory, bad.directory, "--text", held_out,
        "--window", 32, "--stride", 32, json_to=tmp_path / "eval.json",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    original, *others = ran.json["models"]
    assert [set(model) >= EVAL_KEYS for model in ran.json["models"]] == [True] * 3
    assert original["kl"] == 0 and original["top1_agreement"] == 1
    assert original["file_bytes"] == (good.model / "model.safetensors").stat().st_size
    for entry, output in zip(others, (good, bad), strict=True):
        assert entry["name"] == str(output.directory)
        assert entry["file_bytes"] == output.ran.json["file_bytes"]
        assert entry["kl"] > 0 and entry["perplexity_stderr"] > 0
        assert 0 < entry["top1_agreement"] < 1
    assert ran.json["models"][1]["kl"] < ran.json["models"][2]["kl"]
    assert "windows of 32" in ran.out


def test_eval_wants_the_original_first(compressed: Any, held_out: Path) -> None:
    output = compressed("rtn")
    ran = run("eval", output.directory, output.model, "--text", held_out)
    assert ran.code == 2 and "name the original model first" in ran.err


@EVERY_METHOD
def test_inspect_lists_every_layer(compressed: Any, method: str, tmp_path: Path) -> None:
    output = compressed(method)
    ran = run("inspect", output.directory, json_to=tmp_path / "inspect.json")
    assert ran.code == 0, ran.err
    assert len(ran.json["layers"]) == LAYERS
    assert ran.json["file_bytes"] == output.ran.json["file_bytes"]
    stored = sum(row["bits"] * row["shape"][0] * row["shape"][1] for row in ran.json["layers"])
    assert stored <= 8 * ran.json["compressed_bytes"]
    for row in ran.json["layers"]:
        assert row["name"] in ran.out
        assert 0 < row["relative_loss"] < LARGEST_LOSS.get(method, 0.1)


def test_generate_continues_a_prompt(compressed: Any, tmp_path: Path) -> None:
    output = compressed("gptq")
    for model in (output.model, output.directory):
        ran = run(
            "generate", model, "--prompt", SENTENCES[0], "--max-new-tokens", 8,
            json_to=tmp_path / "generate.json",
        )  # fmt: skip
        assert ran.code == 0, ran.err
        assert ran.json["prompt"] == SENTENCES[0] and ran.json["text"]
        # A character of which only some bytes were generated is not printed.
        assert ran.out == SENTENCES[0] + ran.json["text"].rstrip("\ufffd") + "\n"


def test_generate_reads_standard_input(compressed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("The dog"))
    ran = run("generate", compressed("rtn").directory, "--max-new-tokens", 2)
    assert ran.code == 0 and ran.out.startswith("The dog")


def test_generate_samples_by_seed(compressed: Any) -> None:
    def sample(seed: int) -> str:
        ran = run(
            "generate", compressed("rtn").directory, "--prompt", "The", "--temperature", 1.5,
            "--max-new-tokens", 12, "--seed", seed,
        )  # fmt: skip
        assert ran.code == 0, ran.err
        return ran.out

    assert sample(1) == sample(1) != sample(2)


def test_verify_names_the_file_that_was_altered(compressed: Any, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(compressed("rtn").directory, damaged)
    (shard,) = damaged.glob("model-compressed-*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-100] ^= 1
    shard.write_bytes(content)
    ran = run("verify", damaged, json_to=tmp_path / "verify.json")
    assert ran.code == 4 and ran.json["ok"] is False
    assert [claim["holds"] for claim in ran.json["claims"]].count(False) >= 1
    assert shard.name in ran.out and "NOT verified" in ran.out


def test_verify_of_something_else_fails(compressed: Any, tmp_path: Path) -> None:
    for directory in (tmp_path / "missing", compressed("rtn").model):
        ran = run("verify", directory, json_to=tmp_path / "verify.json")
        assert ran.code == 4 and ran.json["ok"] is False


@torch.no_grad()
def test_export_is_a_plain_model(compressed: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    output, plain = compressed("quip-sharp"), tmp_path / "plain"
    ran = run("export", output.directory, "-o", plain, "--dtype", "float32")
    assert ran.code == 0, ran.err
    assert "quantization_config" not in json.loads((plain / "config.json").read_text())
    tokens = torch.arange(16)[None] * 7 % 320
    exported = AutoModelForCausalLM.from_pretrained(plain)(tokens).logits
    # One path rotates activations, the other has rotated the weight: float32 sums in two orders.
    own = load(output.directory)(tokens).logits
    torch.testing.assert_close(exported, own, rtol=1e-4, atol=1e-4)


def test_calibrate_saves_every_input(compressed: Any, text: Path, tmp_path: Path) -> None:
    arguments = (
        "calibrate", compressed("rtn").model, "-o", tmp_path / "statistics", "--dataset", text,
        "--nsamples", NSAMPLES, "--seqlen", SEQLEN,
    )  # fmt: skip
    ran = run(*arguments, json_to=tmp_path / "calibrate.json")
    assert ran.code == 0, ran.err
    assert ran.json["sites"] == 8 and ran.json["tokens"] == NSAMPLES * SEQLEN
    before = {p.name: p.read_bytes() for p in (tmp_path / "statistics").iterdir()}
    assert len(before) == 3  # a file per block and the index
    assert run(*arguments).code == 0
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "statistics").iterdir()}


def test_verify_recomputes_errors_from_model_and_statistics(
    compressed: Any, text: Path, tmp_path: Path
) -> None:
    output, statistics = compressed("quip-sharp"), tmp_path / "statistics"
    ran = run(
        "calibrate", output.model, "-o", statistics, "--dataset", text,
        "--nsamples", NSAMPLES, "--seqlen", SEQLEN,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    directory, model = output.directory, output.model
    weighted = run("verify", directory, "--model", model, "--hessians", statistics)
    assert weighted.code == 0, weighted.out
    assert "weighted error" in weighted.out
    assert run("verify", directory, "--model", compressed("rtn", seed=1).model).code == 4
    lonely = run("verify", directory, "--hessians", statistics)
    assert lonely.code == 2 and "model" in lonely.err


CURVES = {
    "groups": [
        {
            "name": name,
            "weights": 100,
            "options": [
                {"label": f"{bits}b", "bits": 100 * bits, "distortion": scale * 4.0**-bits}
                for bits in (2, 3, 4)
            ],
        }
        for name, scale in (("loud", 16.0), ("quiet", 1.0))
    ],
    "ties": [],
}


def test_allocate_solves_saved_curves(tmp_path: Path) -> None:
    curves = tmp_path / "curves.json"
    curves.write_text(json.dumps(CURVES))
    ran = run("allocate", curves, "--budget", 600, "--frontier", json_to=tmp_path / "plan.json")
    assert ran.code == 0, ran.err
    assert ran.json["choice"] == {"loud": "4b", "quiet": "2b"}
    assert ran.json["bits"] == 600 and ran.json["plan_gap"] >= 0
    assert ran.json["bound"] <= ran.json["distortion"] == 16 / 256 + 1 / 16
    assert ran.json["price"] >= 0 and len(ran.json["frontier"]) >= 3


@pytest.mark.parametrize(
    ("arguments", "content", "code", "message"),
    [
        (["--budget", "399"], CURVES, 3, "400"),
        ([], CURVES, 2, "--budget"),
        (["--budget", "600"], {"groups": []}, 2, "groups"),
        (["--budget", "600"], {**CURVES, "colour": 1}, 2, "colour"),
        (["--budget", "600"], None, 2, "curves.json"),
    ],
)
def test_allocate_refuses(
    tmp_path: Path, arguments: list[str], content: Any, code: int, message: str
) -> None:
    curves = tmp_path / "curves.json"
    if content is not None:
        curves.write_text(json.dumps(content))
    ran = run("allocate", curves, *arguments)
    assert ran.code == code and message in ran.err and "Traceback" not in ran.err


@pytest.mark.parametrize("methods", first(1, ["rtn", "convex-caldera rtn"]))
def test_report_is_one_page(
    compressed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, methods: str
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("convex_caldera.report.plots.canvas.PNG_DPI", 50)  # nobody looks
    directories = [compressed(method).directory for method in methods.split()]
    ran = run("report", *directories, "-o", tmp_path / "report", json_to=tmp_path / "report.json")
    assert ran.code == 0, ran.err
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert "<html" in page and 'src="http' not in page and 'href="http' not in page
    assert list((tmp_path / "report").glob("*.png"))
    assert ran.json


def test_methods_lists_them_all(tmp_path: Path) -> None:
    ran = run("methods", json_to=tmp_path / "methods.json")
    assert ran.code == 0
    assert [method["name"] for method in ran.json["methods"]] == list(METHODS)
    for method in ran.json["methods"]:
        assert method["sentence"].endswith(".") and method["paper"] and method["name"] in ran.out


COMMANDS = [
    "compress", "plan", "calibrate", "allocate", "demo", "eval", "inspect", "generate", "verify",
    "report", "export", "distortion", "methods", "stages", "sweep",
    "eval-pope", "bench", "compare",
]  # fmt: skip


def test_help_lists_the_commands_and_imports_nothing_heavy() -> None:
    script = (
        "import sys\n"
        "from convex_caldera.cli.app import run\n"
        "assert run(['--help']) == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'scipy', 'numba', 'matplotlib', 'pydantic'}\n"
        "print('HEAVY', sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "HEAVY []" in done.stdout
    assert [name for name in COMMANDS if f"\n  {name} " not in done.stdout] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    ran = run(command, "--help")
    assert ran.code == 0 and ran.out.startswith("Usage: convex-caldera " + command)
    assert "--json" in ran.out or command == "export"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Usage"),
        (("frobnicate",), "No such command"),
        (("compress",), "Missing argument"),
        (("compress", "model"), "--output-dir"),
        (("compress", "model", "-o", "out", "--bitz", "4"), "--bitz"),
        (("compress", "model", "-o", "out", "--bits", "many"), "valid number"),
        (("compress", "model", "-o", "out", "--workers", "0"), "--workers"),
    ],
)
def test_wrong_usage_is_code_2(arguments: tuple[str, ...], message: str) -> None:
    ran = run(*arguments)
    assert ran.code == 2 and message in ran.err + ran.out


@pytest.mark.slow
def test_python_m_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "convex_caldera", "allocate", "/no/such/curves", "--budget", "1"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
