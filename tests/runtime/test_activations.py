"""Rounded activations: what the format holds, in every model, loaded either way, and no more."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from convex_caldera.certify.reader import read_output
from convex_caldera.errors import FormatError, ModelError, RecipeError
from convex_caldera.quantizers import MXInt
from convex_caldera.recipes.activations import Activations, parse_activations
from convex_caldera.runtime.activations import rounded
from convex_caldera.runtime.attention import Attention, round_activations
from convex_caldera.runtime.linear import CompressedLinear
from convex_caldera.runtime.load import load
from convex_caldera.storage.read import open_container
from convex_caldera.workflow.compress import compress_to
from convex_caldera.workflow.settings import make_settings
from tests.examples import first

FINE = "mxint8/0,attention:none"
SPELLINGS = [
    "mxint8/16",
    "mxint6-legacy/16",
    "sint8/128,attention:none",
    "none,attention:mxint8/16",
    "mxint8/16,attention:mxint6/16,layout:legacy",
    "e4m3/32",
    "int8/0",
]


@pytest.mark.parametrize("text", SPELLINGS)
def test_activations_read_their_own_name(text: str) -> None:
    assert parse_activations(text).name == text


@pytest.mark.parametrize(
    "text",
    ["", "none", "mxint8/16,attention:", "mxint8/16,layout:other", "mxint8/16,key:1", "mxint/16",
     "mxint8e4/16", "mxint9/16", "mxint8/16,layout:legacy,layout:legacy", "float16"],
)  # fmt: skip
def test_impossible_activations_are_refused(text: str) -> None:
    with pytest.raises(RecipeError):
        parse_activations(text)


@given(st.integers(2, 8), st.integers(1, 40), st.sampled_from([0, 1, 3, 16]), st.integers(0, 99))
def test_rounding_without_codes_is_encode_and_decode(
    bits: int, n: int, group: int, seed: int
) -> None:
    x = torch.randn(5, n, generator=torch.Generator().manual_seed(seed))
    x[0] = 0
    quantizer = MXInt(bits, group)
    fitted = quantizer.fit(x)
    assert torch.equal(rounded(x, quantizer), fitted.decode(fitted.encode(x)))
    assert torch.equal(rounded(x.view(1, 5, n), quantizer)[0], rounded(x, quantizer))


@pytest.mark.parametrize("text", ["mxint8/16", "sint8/16", "e4m3/16"])
def test_rounding_passes_gradients_straight_through(text: str) -> None:
    quantizer = parse_activations(text).linear
    assert quantizer is not None
    x = torch.randn(3, 20, requires_grad=True)
    y = rounded(x, quantizer)
    assert not torch.equal(y, x)
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize("layout", ["contraction", "legacy"])
def test_attention_rounds_along_the_axis_that_it_says(layout: str) -> None:
    """A large value coarsens the block that it lies in: its channel over tokens, or its token."""
    attention = Attention(MXInt(8, 4), layout)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 8, 8, generator=generator) for _ in range(3))
    module = torch.nn.Module()
    plain, _ = attention(module, query, key, value, None)
    assert plain.shape == (1, 8, 2, 8)
    spiked = value.clone()
    spiked[0, 0, 0, 0] = 1e6  # head 0, token 0, channel 0
    weights = torch.full((1, 1, 8, 8), torch.finfo(torch.float32).min)
    weights[..., 1:] = 0  # nobody looks at token 0
    before, _ = attention(module, query, key, value, weights)
    after, _ = attention(module, query, key, spiked, weights)
    changed = (before - after).abs().amax(dim=(0, 1))[0] > 1e-3  # by channel of head 0
    lost = {"contraction": [0], "legacy": []}[layout]  # its block is its own token
    assert changed.nonzero().flatten().tolist() == lost


@pytest.mark.parametrize("heads", [1, 2])
def test_fine_rounding_is_eager_attention(heads: int) -> None:
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(2, 4, 6, 16, generator=generator)
    key, value = (torch.randn(2, 4 // heads, 6, 16, generator=generator) for _ in range(2))
    out, _ = Attention(MXInt(8, 1), "contraction")(torch.nn.Module(), query, key, value, None)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key.repeat_interleave(heads, 1), value.repeat_interleave(heads, 1)
    )
    assert (out - expected.transpose(1, 2)).abs().max() < 0.05


@pytest.fixture(scope="module")
def compressed(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`compressed(family, activations)`: a directory, made once; do not write into it."""

    @functools.cache
    def make(family: str = "llama", activations: str | None = None) -> Path:
        out = tmp_path_factory.mktemp(f"activations-{family}") / "out"
        asked = {} if activations is None else {"activations": activations}
        wish = make_settings(model=str(tiny_model(family)), method="rtn", bits=9.0, **asked)
        compress_to(wish, out, workers=1)
        return out

    return make


@pytest.mark.parametrize("family", first(1, ["llama", "phi3", "opt", "gemma2", "gpt_neox"]))
def test_both_loaders_round_the_same_activations(compressed: Any, family: str) -> None:
    from transformers import AutoModelForCausalLM

    out = compressed(family, "mxint8/16")
    plain = load(compressed(family))
    ours, theirs = load(out), AutoModelForCausalLM.from_pretrained(out)
    tokens = torch.arange(24).view(1, 24) % 300
    with torch.no_grad():
        rounded_logits = ours(tokens).logits
        assert torch.equal(rounded_logits, theirs(tokens).logits)
        error = (rounded_logits - plain(tokens).logits).norm() / plain(tokens).logits.norm()
    assert 1e-4 < error < 0.2
    assert read_output(out).layers.keys() == open_container(out).layers.keys()


def test_saving_and_loading_again_keeps_them(compressed: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = load(compressed("llama", "mxint4/16,layout:legacy"))
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    tokens = torch.arange(20).view(1, 20)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, again(tokens).logits)


def test_card_and_export_say_that_activations_were_rounded(compressed: Any, tmp_path: Path) -> None:
    from convex_caldera.workflow.exporting import export_directory

    out = compressed("llama", "mxint8/16")
    assert "`mxint8/16`" in (out / "README.md").read_text()
    assert "mxint8/16" in export_directory(out, tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())


def test_without_the_option_nothing_changes(compressed: Any) -> None:
    out = compressed()
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config == {"quant_method": "convex_caldera", "format_version": 1}
    model = load(out)
    layers = [m for m in model.modules() if isinstance(m, CompressedLinear)]
    assert layers and all(layer.activation is None for layer in layers)
    assert not model.config._attn_implementation.startswith("convex_caldera")


def test_attention_that_cannot_be_replaced_is_refused(compressed: Any) -> None:
    model = load(compressed("bloom"))
    with pytest.raises(ModelError, match="attention:none"):
        round_activations(model, parse_activations("mxint8/16"))
    round_activations(model, parse_activations(FINE))
    assert torch.isfinite(model(torch.arange(9).view(1, 9)).logits).all()


@pytest.mark.parametrize("text", ["mxint8", "mxint8/16,attention:mxint8/16", "none", 8, "x" * 99])
def test_a_forged_config_is_refused_twice(compressed: Any, tmp_path: Path, text: Any) -> None:
    out = shutil.copytree(compressed("llama", "mxint8/16"), tmp_path / "out")
    path = out / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["activations"] = text
    path.write_text(json.dumps(config))
    with pytest.raises(FormatError, match="activations"):
        open_container(out, verify=False)
    with pytest.raises(FormatError, match="activations"):
        read_output(out)


def test_label_bits_are_those_of_linear_inputs() -> None:
    assert parse_activations("mxint6/16,attention:mxint8/16").bits == 6
    assert parse_activations("none,attention:mxint8/16").bits == 8
    with pytest.raises(RecipeError, match="block"):
        Activations(MXInt(8, -1))
