"""Bad input ends in one line that says what is wrong and how to go on, and in the right code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.examples import first
from tests.workflow.running import Ran, compress, run

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
Tensors = dict[str, torch.Tensor]


def refused(ran: Ran, code: int, *parts: str) -> None:
    """One line of error on standard error, with all its parts, and the code."""
    (line,) = [line for line in ran.err.splitlines() if line.startswith("error: ")]
    assert ran.code == code, line
    assert [part for part in parts if part not in line] == [], line
    assert "Traceback" not in ran.err


@pytest.fixture
def model(tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    """A model of one layer to be spoiled."""
    copy = tmp_path / "model"
    shutil.copytree(tiny_model("llama", num_hidden_layers=1), copy)
    return copy


@pytest.fixture(scope="module")
def sound(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("llama", num_hidden_layers=1)


def change_weights(model: Path, change: Callable[[Tensors], Any]) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def change_config(model: Path, **values: Any) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **values}))


# --- the model ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["rtn", "gptq", "convex-caldera"])
@pytest.mark.parametrize("value", first(1, [float("nan"), float("inf")]))
def test_weights_that_are_no_numbers(
    model: Path, text: Path, tmp_path: Path, method: str, value: float
) -> None:
    change_weights(model, lambda tensors: tensors[Q_PROJ].view(-1).__setitem__(5, value))
    ran = compress(model, tmp_path / "out", text, "-m", method, "--bits", 6)
    refused(ran, 4, "model.layers.0.self_attn.q_proj", "repair the checkpoint")


@pytest.mark.parametrize("method", ["gptq", "convex-caldera"])
def test_activations_that_overflow(model: Path, text: Path, tmp_path: Path, method: str) -> None:
    def blow_up(tensors: Tensors) -> None:
        for name in ("gate_proj", "up_proj"):
            tensors[f"model.layers.0.mlp.{name}.weight"] *= 1e20

    change_weights(model, blow_up)
    ran = compress(model, tmp_path / "out", text, "-m", method, "--bits", 6)
    refused(ran, 4, "model.layers.0.mlp.down_proj", "sample 0")


def test_truncated_weights(model: Path, text: Path, tmp_path: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    ran = compress(model, tmp_path / "out", text, "-m", "rtn")
    refused(ran, 4, "model.safetensors", "truncated or damaged", "fetch it again")


def test_a_missing_tensor(model: Path, text: Path, tmp_path: Path) -> None:
    change_weights(model, lambda tensors: tensors.pop(Q_PROJ))
    ran = compress(model, tmp_path / "out", text, "-m", "rtn")
    refused(ran, 2, Q_PROJ, "incomplete")


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"hidden_size": 64}, ["(320, 48)", "(320, 64)"]),
        ({"num_hidden_layers": 2}, ["model.layers.1", "missing"]),
        ({"model_type": "zzz"}, ["zzz"]),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, ["quantized already"]),
    ],
)
def test_a_configuration_of_another_model(
    model: Path, text: Path, tmp_path: Path, values: dict[str, Any], parts: list[str]
) -> None:
    change_config(model, **values)
    refused(compress(model, tmp_path / "out", text, "-m", "rtn"), 2, *parts)


def test_a_model_that_is_compressed_already(compressed: Any, text: Path, tmp_path: Path) -> None:
    ran = compress(compressed("rtn").directory, tmp_path / "out", text)
    refused(ran, 2, "quantized already", "give the original model")


def test_a_model_without_decoder_blocks(
    tiny_model: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    """A causal language model of one linear layer: nothing here repeats."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "mamba", vocab_size=320, hidden_size=16, num_hidden_layers=0, state_size=4
    )
    flat = tmp_path / "flat"
    AutoModelForCausalLM.from_config(config).save_pretrained(flat)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model("llama", num_hidden_layers=1) / file, flat)
    refused(compress(flat, tmp_path / "out", text), 2, "no decoder blocks")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("/no/such/model", ["not a directory", "hub id", "bundled"]),
        (".", ["config.json"]),
    ],
)
def test_a_model_that_is_not_there(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, parts: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(compress(Path(name), tmp_path / "out", text), 2, *parts)


def test_a_tokenizer_that_is_missing(model: Path, text: Path, tmp_path: Path) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (model / file).unlink()
    ran = compress(model, tmp_path / "out", text, "-m", "gptq", "--bits", 6)
    refused(ran, 2, "tokenizer")
    assert compress(model, tmp_path / "plain", text, "-m", "rtn", "--bits", 6).code == 0


# --- options --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--method", "gtpq"], ["unknown method 'gtpq'", "did you mean gptq", "methods"]),
        (["--bits", 4, "--size", "1MB"], ["bits and size exclude each other"]),
        (["--size", "1MB", "--ratio", "3x"], ["size and ratio exclude each other"]),
        (["--bits", 0], ["bits", "greater than 0"]),
        (["--bits", 17], ["bits", "16"]),
        (["--bits", "nan"], ["bits"]),
        (["--size", "1XB"], ["'1XB'", "1.5GB"]),
        (["--ratio", "0.5"], ["'0.5'", "6x"]),
        (["--rank", -1], ["rank", "-1"]),
        (["--factor-bits", 5], ["factor_bits", "2, 3, 4 or 16"]),
        (["--dtype", "int8"], ["dtype", "'int8'"]),
        (["--device", "abacus"], ["device 'abacus'"]),
        (["--device", "meta"], ["device 'meta'"]),
        (["--ignore", "*"], ["every linear layer is ignored"]),
        (["--ignore", "no_such_layer"], ["'no_such_layer'", "fits none of 7 layers"]),
        (["--ignore", "re:("], ["'re:('", "regular expression"]),
        (["--pin", "q_proj"], ["pin 'q_proj'", "pattern=key:number"]),
        (["--pin", "=bits:4"], ["pin '=bits:4'"]),
        (["--pin", "q_proj=bitz:4"], ["bitz", "keys bits, rank, factor_bits, group"]),
        (["--pin", "q_proj=bits:four"], ["bits:four"]),
        (["--pin", "q_proj=bits:4,bits:3"], ["each once"]),
        (["--pin", "no_such_layer=bits:4"], ["'no_such_layer'", "fits none"]),
        (["-m", "caldera", "--pin", "q_proj=bits:8"], ["2, 3 or 4", "got 8"]),
        (["-m", "qtip", "--pin", "q_proj=bits:9"], ["1 to 8", "got 9"]),
        (["-m", "gptq", "--rank", 4], ["gptq has no rank"]),
        (["-m", "gptq", "--clip-ratio", 0.9], ["gptq has no clip ratio"]),
        (["-m", "scl-lloyd-max", "--block-size", 4], ["scl-lloyd-max has no block size"]),
        (["-m", "scl-vector-vq", "--block-size", 3], ["block_size", "1, 2, 4 or 8"]),
        (["-m", "scl-vector-vq", "--code-bits", 13], ["code_bits", "12"]),
        (
            ["-m", "scl-vector-vq", "--code-bits", 12, "--block-size", 8],
            ["4096 entries", "is larger than", "choose fewer --code-bits"],
        ),
        (["-m", "scl-lloyd-max", "--code-bits", 9], ["1 to 8 bits", "got 9"]),
        (["-m", "scl-scalar-uniform", "--clip-ratio", 1.5], ["clip_ratio", "1"]),
        (["-m", "rtn", "--coder", "zip"], ["coder", "'huffman' or 'rans'"]),
        (["--coder", "rans"], ["convex-caldera counts its codes before", "leave out coder"]),
        (["-m", "gptq", "--factor-bits", 2], ["gptq has no factor bits"]),
        (["-m", "qtip", "--group-size", 8], ["qtip has no group size"]),
        (["-m", "gptq", "--pin", "q_proj=rank:4"], ["gptq has no rank"]),
        (["-m", "gptq", "--tie", "q_proj,k_proj"], ["gptq allocates nothing", "tie"]),
        (["-m", "gptq", "--bits-menu", "2,3"], ["gptq allocates nothing", "bits menu"]),
        (["-m", "caldera", "--rank-menu", "0,4"], ["caldera allocates nothing", "rank menu"]),
        (["--bits-menu", "two"], ["menu 'two'"]),
        (["--bits-menu", "2,4.03"], ["steps of 1/16", "4.03"]),
        (["--rank-menu", "0,2.5"], ["rank_menu '0,2.5'"]),
        (["--rank-menu", "0,4", "--rank", 4], ["rank and rank_menu exclude each other"]),
        (["--tie", "q_proj"], ["tie 'q_proj'", "one kind"]),
        (["--tie", "q_proj,zzz"], ["'q_proj,zzz'", "zzz ties nothing"]),
        (["--tie", "q_proj,k_proj", "--tie", "k_proj,v_proj"], ["k_proj is tied twice"]),
        (["--tie", "q_proj,k_proj", "--pin", "q_proj=bits:3"], ["tied but pinned differently"]),
        (["--curvature", "sectional"], ["curvature", "'kronecker'"]),
        (["--seqlen", 128], ["at most 64", "--seqlen 64"]),
        (["--seqlen", 4], ["seqlen", "8"]),
        (["--nsamples", 100_000], ["tokens", "100000 windows", "ask for less"]),
    ],
)
def test_options_that_cannot_be_met(
    sound: Path, text: Path, tmp_path: Path, options: list[Any], parts: list[str]
) -> None:
    out = tmp_path / "out"
    refused(compress(sound, out, text, *options), 2, *parts)
    assert not out.exists()


OTHERS = ["rtn", "caldera", "qtip", "convex-caldera"]
BUDGETS = [("--bits", 0.5), ("--size", "1kB"), ("--size", "125kB"), ("--ratio", "50x")]


@pytest.mark.parametrize(
    ("method", "option", "value"),
    [
        *(("gptq", *budget) for budget in BUDGETS),
        *((m, *BUDGETS[0]) for m in OTHERS),
        *first(0, ((m, *b) for m in OTHERS for b in BUDGETS[1:])),
    ],
)
def test_a_budget_below_the_least_feasible(
    sound: Path, text: Path, tmp_path: Path, method: str, option: str, value: Any
) -> None:
    out = tmp_path / "out"
    refused(compress(sound, out, text, "-m", method, option, value), 3, str(value))
    assert not out.exists()


def test_the_least_feasible_budget_is_feasible(sound: Path, text: Path, tmp_path: Path) -> None:
    """The error names a number of bytes; exactly that many are enough, one less is not."""
    ran = compress(sound, tmp_path / "out", text, "-m", "gptq", "--bits", 1)
    refused(ran, 3, "below the least feasible")
    bits = float(ran.err.partition("ask for --bits ")[2].split()[0])
    assert compress(sound, tmp_path / "tight", text, "-m", "gptq", "--bits", bits).code == 0
    ran = compress(sound, tmp_path / "less", text, "-m", "gptq", "--bits", bits - 0.001)
    refused(ran, 3, f"--bits {bits:g}")

    refused(ran := compress(sound, tmp_path / "out", text, "-m", "gptq", "--size", "9kB"), 3)
    size = int(ran.err.partition("ask for --size ")[2].split()[0])
    ran = compress(sound, tmp_path / "small", text, "-m", "gptq", "--size", size)
    assert ran.code == 0 and ran.json["file_bytes"] == size
    ran = compress(sound, tmp_path / "out", text, "-m", "gptq", "--size", size - 1)
    refused(ran, 3, f"--size {size}")


def test_infeasible_because_of_pins(sound: Path, text: Path, tmp_path: Path) -> None:
    pin = "gate_proj=bits:8"
    options = ("-m", "gptq", "--bits", 3)
    assert compress(sound, tmp_path / "free", text, *options).code == 0
    ran = compress(sound, tmp_path / "out", text, *options, "--pin", pin)
    refused(ran, 3, "below the least feasible", f"pins: {pin}")


# --- files ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("missing.txt", None, ["missing.txt", "not a file"]),
        ("empty.txt", b"", ["empty.txt is empty"]),
        ("binary.txt", bytes(range(256)), ["binary.txt", "UTF-8"]),
        ("short.txt", b"Too short.", ["short.txt has", "4 windows"]),
        ("table.csv", b"a,b", ["table.csv", ".txt, .jsonl"]),
        ("lines.jsonl", b'{"text": 3}\n', ["lines.jsonl, line 1", '"text"']),
    ],
)
def test_texts_that_cannot_be_read(
    sound: Path, tmp_path: Path, name: str, content: bytes | None, parts: list[str]
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    ran = compress(sound, tmp_path / "out", tmp_path / name, "-m", "gptq", "--bits", 6)
    refused(ran, 2, *parts)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ('metod = "rtn"', ["unknown key 'metod'", "did you mean method"]),
        ('[run]\nmethod = "rtn"\ncolour = 1', ["unknown key 'colour'"]),
        ('bits = 4\n[run]\nmethod = "rtn"', ["unknown key 'bits'", "beside [run]"]),
        ('[run]\nbits = 4\nsize = "1MB"', ["exclude each other"]),
        ("[run]\nbits = true", ["bits", "True"]),
        ("run = 3", ["[run] must be a table"]),
        ("bits = ", ["not valid TOML"]),
        (None, ["there is no file"]),
    ],
)
def test_configurations_that_cannot_be_read(
    sound: Path, text: Path, tmp_path: Path, content: str | None, parts: list[str]
) -> None:
    if content is not None:
        (tmp_path / "run.toml").write_text(content)
    ran = compress(sound, tmp_path / "out", text, "--config", tmp_path / "run.toml")
    refused(ran, 2, *parts)


def test_an_output_directory_in_use(
    compressed: Any, sound: Path, text: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("mine")
    for out in (tmp_path / "full", compressed("rtn").directory):
        ran = compress(sound, out, text, "-m", "rtn", "--bits", 6)
        refused(ran, 2, "is not empty", "choose another")
    ran = compress(sound, tmp_path / "file", text, "-m", "rtn", "--bits", 6)
    refused(ran, 2, "is a file")
    assert (tmp_path / "file").read_text() == (tmp_path / "full" / "note.txt").read_text() == "mine"


def test_a_place_that_cannot_be_written(sound: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ran = compress(sound, tmp_path / "file" / "out", text, "-m", "rtn", "--bits", 6)
    refused(ran, 2, "file/out")
    refused(run("methods", "--json", tmp_path), 2, tmp_path.name)


def test_statistics_do_not_mix(sound: Path, text: Path, tmp_path: Path) -> None:
    def calibrate(out: Path, nsamples: int) -> Ran:
        return run(
            "calibrate", sound, "-o", out, "--dataset", text, "--nsamples", nsamples,
            "--seqlen", 16,
        )  # fmt: skip

    assert calibrate(tmp_path / "statistics", 2).code == 0
    refused(calibrate(tmp_path / "statistics", 3), 2, "another")
    refused(calibrate(sound, 2), 2, "holds no statistics")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--prompt", "x", "--chat"], ["no chat template"]),
        (["--prompt", "x", "--temperature", -1], ["temperature"]),
        (["--prompt", "x", "--top-p", 7], ["top_p"]),
        (["--prompt", "x", "--max-new-tokens", 0], ["max_new_tokens"]),
        (["--prompt", "x" * 300], ["at most 64"]),
    ],
)
def test_prompts_that_cannot_be_continued(
    sound: Path, arguments: list[Any], parts: list[str]
) -> None:
    refused(run("generate", sound, *arguments), 2, *parts)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--window", 128], ["at most 64", "--window 64"]),
        (["--window", 1], ["window"]),
        (["--window", 16, "--stride", 32], ["stride"]),
        (["--window", 16, "--stride", 0], ["stride"]),
        (["--window", 16, "--max-tokens", 0], ["too few to score"]),
        (["--window", 16, "--stride", 16, "--device", "abacus"], ["abacus"]),
    ],
)
def test_protocols_that_make_no_sense(
    sound: Path, held_out: Path, arguments: list[Any], parts: list[str]
) -> None:
    refused(run("eval", sound, "--text", held_out, *arguments), 2, *parts)


def test_exports_that_cannot_be_made(compressed: Any, sound: Path, tmp_path: Path) -> None:
    done = compressed("rtn").directory
    refused(run("export", done, "-o", tmp_path / "plain", "--dtype", "int8"), 2, "int8", "bfloat16")
    refused(run("export", done, "-o", sound), 2, "not empty")
    refused(run("export", sound, "-o", tmp_path / "plain"), 4, "not a finished output")
    refused(run("inspect", sound), 4, "not a finished output")
