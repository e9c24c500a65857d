"""Every family of decoders is compressed, and loads by us and by transformers to equal logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import convex_caldera
from tests.loading import from_transformers
from tests.tiny_models import FAMILIES
from tests.workflow.running import compress, shard_bytes

pytestmark = pytest.mark.slow

TOKENS = torch.arange(24).view(2, 12) * 7 % 320
# Two layers where blocks may differ from each other; one elsewhere, for time.
SHAPES: dict[str, dict[str, Any]] = {
    **{family: {"family": family, "num_hidden_layers": 1} for family in FAMILIES},
    "tied": {"family": "llama", "tie_word_embeddings": True},
    "qwen2-tied": {"family": "qwen2", "tie_word_embeddings": True, "num_hidden_layers": 1},
    "sharded": {"family": "mistral", "shard": "60kB"},
    "no-rank-of-two": {
        "family": "llama",
        "hidden_size": 96,
        "intermediate_size": 288,
        "num_hidden_layers": 1,
    },
}
# At seven bits uniform grids and trellises say nearly what the original said; E8P has four bits
# at most, NormalFloat too, and random weights forgive less than trained ones.
LEAST_COSINE = {"gptq": 0.98, "qtip": 0.98, "convex-caldera": 0.98, "nf4": 0.9}
LEAST_LATTICE_COSINE = 0.8


def original(model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(TOKENS).logits.double()


@pytest.mark.parametrize(
    ("case", "method"),
    [
        *((case, "gptq") for case in SHAPES),
        *((family, "caldera") for family in FAMILIES if family != "llama"),
        ("opt", "convex-caldera"),
        ("phi3", "convex-caldera"),
        ("tied", "qtip"),
        ("sharded", "nf4"),
        ("no-rank-of-two", "quip-sharp"),
    ],
)
def test_family_survives_compression(
    tiny_model: Callable[..., Path], text: Path, tmp_path: Path, case: str, method: str
) -> None:
    options = dict(SHAPES[case])
    model = tiny_model(options.pop("family"), **options)
    limits = ("--rank", 2) if method == "caldera" else ()
    ran = compress(model, tmp_path / "out", text, "--method", method, "--bits", 7, *limits)
    assert ran.code == 0, ran.err
    assert ran.json["file_bytes"] == shard_bytes(tmp_path / "out")["all"]
    assert ran.json["bits_per_compressed_weight"] <= 7
    ours = logits(convex_caldera.load(tmp_path / "out", dtype=torch.float32))
    theirs = logits(from_transformers(tmp_path / "out", dtype=torch.float32))
    assert torch.equal(ours, theirs)
    expected = logits(original(model))
    assert not torch.equal(ours, expected)
    cosine = torch.cosine_similarity(ours.flatten(), expected.flatten(), dim=0)
    assert cosine > LEAST_COSINE.get(method, LEAST_LATTICE_COSINE)


def test_a_tied_embedding_stays_one_matrix(
    tiny_model: Callable[..., Path], compressed: Any
) -> None:
    output = compressed("gptq", tie_word_embeddings=True)
    model = convex_caldera.load(output.directory)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    untied = compressed("gptq")
    assert output.ran.json["file_bytes"] < untied.ran.json["file_bytes"]
    loose = convex_caldera.load(untied.directory)
    assert loose.get_input_embeddings().weight is not loose.get_output_embeddings().weight


def test_sharded_and_whole_checkpoints_give_the_same_weights(
    tiny_model: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    outs = []
    for shard in ("5GB", "60kB"):
        model = tiny_model("mistral", shard=shard)
        assert (len(list(model.glob("*.safetensors"))) > 1) == (shard == "60kB")
        outs.append(tmp_path / shard)
        assert compress(model, outs[-1], text, "--method", "gptq", "--bits", 6).code == 0
    one, other = ([p.read_bytes() for p in sorted(out.glob("*.safetensors"))] for out in outs)
    assert one == other
