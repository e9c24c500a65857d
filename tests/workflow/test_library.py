"""The library's own calls: compress a name or a model in memory, save, load."""

from __future__ import annotations

import gc
import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import convex_caldera
from convex_caldera.errors import InfeasibleBudgetError, ModelError, RecipeError, ResumeError
from convex_caldera.workflow.settings import Settings
from tests import tiny_models
from tests.workflow.fixtures import BITS
from tests.workflow.running import NSAMPLES, SEQLEN, snapshot

SMALL = {"nsamples": NSAMPLES, "seqlen": SEQLEN}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CONVEX_CALDERA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.slow
def test_a_path_gives_the_bytes_of_the_command(compressed: Any, text: Path, tmp_path: Path) -> None:
    by_command = compressed("gptq")
    result = convex_caldera.compress(
        by_command.model, bits=float(BITS), method="gptq", dataset=str(text),
        hessians=tmp_path / "statistics", **SMALL,
    )  # fmt: skip
    assert (tmp_path / "statistics" / "calibration.json").is_file()
    saved = result.save(tmp_path / "out")
    assert saved == tmp_path / "out" and snapshot(saved) == snapshot(by_command.directory)
    assert result.summary.file_bytes == by_command.ran.json["file_bytes"]


@torch.no_grad()
def test_a_model_in_memory_is_left_alone(text: Path, tmp_path: Path, cache: Path) -> None:
    model, tokenizer = tiny_models.build("llama", num_hidden_layers=1), tiny_models.tokenizer()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tokens = torch.arange(12)[None]
    result = convex_caldera.compress(
        model, tokenizer=tokenizer, bits=BITS, method="lqer", rank=2, dataset=str(text), **SMALL
    )
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    in_cache = result.load()(tokens).logits
    result.save(tmp_path / "out")
    assert torch.equal(convex_caldera.load(tmp_path / "out")(tokens).logits, in_cache)
    assert 0 < (in_cache - model(tokens).logits).abs().max() < 5
    del result
    gc.collect()
    assert list(cache.iterdir()) == []  # nothing is left behind


def test_a_model_in_memory_without_tokenizer(tmp_path: Path) -> None:
    model = tiny_models.build("llama", num_hidden_layers=1)
    convex_caldera.compress(model, bits=BITS, method="rtn").save(tmp_path / "out")
    with pytest.raises(ModelError, match="tokenizer"):
        convex_caldera.compress(model, bits=BITS, method="gptq", **SMALL)


def test_mistakes_raise_their_own_errors(
    tiny_model: Callable[..., Path], tmp_path: Path, cache: Path
) -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    for error, message, wrong in (
        (RecipeError, "unknown method 'gtpq'", {"method": "gtpq"}),
        (RecipeError, "unknown key 'bitz'", {"bitz": 4}),
        (RecipeError, "exclude each other", {"bits": 4, "size": "1MB"}),
        (InfeasibleBudgetError, "ask for --bits", {"method": "rtn", "bits": 0.5}),
    ):
        with pytest.raises(error, match=message):
            convex_caldera.compress(model, **wrong)
    with pytest.raises(ModelError, match="neither a path nor a transformers model"):
        convex_caldera.compress(torch.nn.Linear(2, 2), bits=4)
    assert list(cache.iterdir()) == []


def test_save_does_not_overwrite(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    result = convex_caldera.compress(model, bits=BITS, method="rtn")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note.txt").write_text("mine")
    with pytest.raises(ResumeError, match="not empty"):
        result.save(tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["note.txt"]
    result.save(str(tmp_path / "first"))
    result.save(tmp_path / "second")
    assert snapshot(tmp_path / "first") == snapshot(tmp_path / "second")


def test_every_option_of_the_command_is_a_setting() -> None:
    from convex_caldera.cli.compressing import compress as command
    from convex_caldera.cli.groups import spelled_out

    options = set(inspect.signature(spelled_out(command)).parameters)
    own = {"output_dir", "config", "workers", "json", "hessians", "measured"}
    assert options - own <= set(Settings.model_fields)


@pytest.mark.slow
def test_loads_in_a_fresh_process_after_one_import(compressed: Any, tmp_path: Path) -> None:
    """transformers knows our format as soon as the package is imported, and not before."""
    output = compressed("gptq")
    script = (
        "import sys, torch, convex_caldera\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)\n"
        "ours = convex_caldera.load(sys.argv[1], dtype=torch.float32)\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "ids = tokenizer('The dog', return_tensors='pt').input_ids\n"
        "with torch.no_grad():\n"
        "    assert torch.equal(model(ids).logits, ours(ids).logits)\n"
        "print(type(model).__name__, type(model.model.layers[0].mlp.up_proj).__name__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(output.directory)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["LlamaForCausalLM", "CompressedLinear"]
