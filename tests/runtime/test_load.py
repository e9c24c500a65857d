"""A directory becomes a model: by our loader, by transformers, and dequantized; all agree."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from convex_caldera.errors import FormatError
from convex_caldera.runtime import CompressedLinear
from convex_caldera.runtime.hf import register
from convex_caldera.runtime.load import load
from convex_caldera.storage import export_dense, open_container
from tests import loading
from tests.examples import first
from tests.storage.making import make_output

CASES: dict[str, dict[str, Any]] = {
    "tied": {"family": "llama", "tie_word_embeddings": True},
    "untied": {"family": "llama", "tie_word_embeddings": False},
    "biases": {"family": "qwen2"},
    "opt": {"family": "opt"},
    "gpt_neox": {"family": "gpt_neox"},
    "phi3": {"family": "phi3"},
}
TOKENS = torch.arange(24).view(2, 12) * 7 % 320


@pytest.fixture(scope="module")
def output(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Path] = {}

    def make(case: str) -> Path:
        if case not in made:
            options = dict(CASES[case])
            model = tiny_model(options.pop("family"), **options)
            made[case] = make_output(model, tmp_path_factory.mktemp(case) / "out").directory
        return made[case]

    return make


def from_transformers(directory: Path, **options: Any) -> Any:
    register()
    return loading.from_transformers(directory, **options)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(TOKENS).logits


@pytest.mark.parametrize("case", first(3, CASES))
def test_both_loaders_and_the_export_agree(case: str, output: Any, tmp_path: Path) -> None:
    directory = output(case)
    ours = load(directory, dtype=torch.float32)
    theirs = from_transformers(directory, dtype=torch.float32)
    assert torch.equal(logits(ours), logits(theirs))
    export_dense(directory, tmp_path / "dense", "float32")
    plain = from_transformers(tmp_path / "dense", dtype=torch.float32)
    torch.testing.assert_close(logits(ours), logits(plain), rtol=1e-3, atol=1e-3)
    names = {n for n, m in ours.named_modules() if isinstance(m, CompressedLinear)}
    assert names == set(open_container(directory).layers)


@pytest.mark.parametrize("case", ["tied", "untied"])
def test_ties_are_kept(case: str, output: Any) -> None:
    for model in (load(output(case)), from_transformers(output(case))):
        shared = model.get_input_embeddings().weight is model.get_output_embeddings().weight
        assert shared == (case == "tied")
        assert not model.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_is_obeyed(dtype: torch.dtype, output: Any) -> None:
    ours = load(output("biases"), dtype=dtype)
    theirs = from_transformers(output("biases"), dtype=dtype)
    assert ours.dtype == theirs.dtype == dtype
    assert torch.equal(logits(ours), logits(theirs))
    exact = logits(load(output("biases"), dtype="float32"))
    assert (logits(ours).float() - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("loader", [load, from_transformers])
def test_saved_model_loads_again(loader: Any, output: Any, tmp_path: Path) -> None:
    model = loader(output("tied"), dtype=torch.float32)
    model.save_pretrained(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "convex_caldera"
    again = from_transformers(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(FormatError, match="manifest"):
        load(tmp_path / "again")


def test_dequantize_makes_plain_layers(output: Any) -> None:
    model = from_transformers(output("untied"), dtype=torch.float32)
    before = logits(model)
    plain = model.dequantize()
    assert not [m for m in plain.modules() if isinstance(m, CompressedLinear)]
    assert [m for m in plain.modules() if isinstance(m, nn.Linear)]
    torch.testing.assert_close(logits(plain), before, rtol=1e-3, atol=1e-3)


def test_generation_runs(output: Any) -> None:
    model = load(output("tied"))
    out = model.generate(TOKENS[:1], max_new_tokens=3, do_sample=False)
    assert out.shape == (1, TOKENS.shape[1] + 3)


def test_config_of_another_model_is_refused(output: Any, tmp_path: Path) -> None:
    import shutil

    out = shutil.copytree(output("untied"), tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    config["intermediate_size"] *= 2
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=r"SHA-256|bytes"):
        load(out)
    with pytest.raises(FormatError, match="does not belong"):
        load(out, verify=False)
    with pytest.raises(FormatError, match="does not belong"):
        from_transformers(out)


SCRIPT = """
import sys
{first}
assert {light} or "transformers" not in sys.modules
{second}
from transformers import AutoModelForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
assert "convex_caldera" in AUTO_QUANTIZER_MAPPING
hook.install(); hook.install()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
kinds = [type(m).__name__ for m in model.modules()]
assert kinds.count("CompressedLinear") > 1, kinds
assert not [f for f in sys.meta_path if type(f).__name__ == "_Finder"]
print("ok")
"""


@pytest.mark.slow
@pytest.mark.parametrize("transformers_first", [False, True])
def test_import_alone_registers(transformers_first: bool, output: Any) -> None:
    hook = "from convex_caldera.runtime import hook; hook.install(); hook.install()"
    other = "import transformers.quantizers.auto"
    first, second = (other, hook) if transformers_first else (hook, "pass")
    script = SCRIPT.format(first=first, second=second, light=transformers_first)
    done = subprocess.run(
        [sys.executable, "-c", script, str(output("tied"))], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.strip() == "ok", done.stderr


def test_hook_costs_next_to_nothing() -> None:
    script = (
        "import sys, time; t = time.perf_counter();"
        "from convex_caldera.runtime import hook; hook.install();"
        "heavy = {'torch', 'numpy', 'transformers', 'safetensors'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
