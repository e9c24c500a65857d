"""A decoder that layers share: stored once, served by both loaders, kept for a resumed run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import convex_caldera
from convex_caldera.errors import RecipeError
from convex_caldera.quantizers import Neural
from convex_caldera.quantizers.neural_patches import patches_of
from convex_caldera.quantizers.neural_training import train
from convex_caldera.runtime.linear import CompressedLinear
from convex_caldera.runtime.replace import homes_of
from convex_caldera.storage.read import open_container
from convex_caldera.workflow.compress import compress_to
from convex_caldera.workflow.decoders import Trained, read_decoder, write_decoder
from convex_caldera.workflow.settings import make_settings
from tests.examples import first
from tests.workflow.running import NSAMPLES, SEQLEN


@pytest.fixture(params=first(1, ["one epoch on one block", "as offered"]))
def directory(request: Any, compressed: Any, tiny_model: Any, text: Path, tmp_path: Path) -> Path:
    """A compressed model whose layers share decoders."""
    if request.param == "as offered":
        return compressed("reallm-ae").directory
    settings = make_settings(
        model=str(tiny_model("llama", num_hidden_layers=1)), method="reallm-ae", bits=8.0,
        neural=("epochs=1",), dataset=str(text), nsamples=NSAMPLES, seqlen=SEQLEN,
    )  # fmt: skip
    compress_to(settings, tmp_path / "out")
    return tmp_path / "out"


def test_one_layer_stores_it_and_both_loaders_find_it(directory: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    container = open_container(directory)
    homes = {name: homes_of(spec) for name, (_, spec) in container.layers.items()}
    owners = {name for name, found in homes.items() if not found}
    assert {home for found in homes.values() for home in found} <= owners
    assert len(owners) < len(homes) / 2

    ours = convex_caldera.load(directory)
    theirs = AutoModelForCausalLM.from_pretrained(directory)
    tokens = torch.arange(16)[None]
    with torch.no_grad():
        expected = ours(tokens).logits
        assert torch.equal(theirs(tokens).logits, expected)
    theirs.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, expected)
    for name, module in ours.named_modules():
        if isinstance(module, CompressedLinear):
            assert torch.equal(module.dequantize().weight, container.layer(name).decode())


def test_a_trained_decoder_returns_from_disk(tmp_path: Path) -> None:
    core = Neural(8, 4, (2,), (2,), 10, (1, 1), epochs=1, encoder_width=4)
    V = torch.randn(16, 16, generator=torch.Generator().manual_seed(0)).clamp(-1, 1) / 2
    patches = patches_of(V, 8)
    trained = Trained(core, *train(patches, core.geometry, core.training))
    path = tmp_path / "decoders" / "one.safetensors"
    write_decoder(path, trained)
    again = read_decoder(path, core)
    assert again is not None
    for name, tensor in trained.decoder.tensors().items():
        assert torch.equal(again.decoder.tensors()[name], tensor)
    assert torch.equal(again.encoder(patches.values), trained.encoder(patches.values))
    wider = Neural(8, 4, (2,), (2,), 12, (1, 1), epochs=1, encoder_width=4)
    assert read_decoder(path, wider) is None
    path.write_bytes(path.read_bytes()[:-5])
    assert read_decoder(path, core) is None


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("reallm-ae", {"targets": "drift-corrected"}, "decoders for several layers at once"),
        ("reallm", {"bits_menu": "2,3"}, "a menu of its own"),
        ("reallm", {"targets": "drift-corrected"}, "leave out drift-corrected targets"),
        ("reallm-ae", {"order": "strip"}, "has no order"),
        ("reallm-ae", {"neural": ("epoch=3",)}, "did you mean epochs"),
        ("gptq", {"neural": ("epochs=3",)}, "gptq has no neural"),
        ("caldera", {"bucket": 2}, "caldera has no bucket"),
    ],
)
def test_what_would_be_ignored_is_refused(
    compressed: Any, text: Path, tmp_path: Path, method: str, options: dict, message: str
) -> None:
    settings = make_settings(
        model=str(compressed("rtn").model), method=method, bits=6.0, dataset=str(text),
        nsamples=NSAMPLES, seqlen=SEQLEN, **options,
    )  # fmt: skip
    with pytest.raises(RecipeError, match=message):
        compress_to(settings, tmp_path / "out")
