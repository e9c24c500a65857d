"""Loading and freeing parts of a model."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from convex_caldera.errors import ModelError, NumericalError
from convex_caldera.models.parameters import slots
from convex_caldera.models.skeleton import Skeleton
from tests import tiny_models
from tests.examples import first


def _real(model) -> set[str]:
    return {slot.name for slot in slots(model) if not slot.parameter.is_meta}


@pytest.fixture
def copied(tiny_model, tmp_path):
    return shutil.copytree(tiny_model("llama"), tmp_path / "copy")


def test_skeleton_loads_one_module_and_frees_it(tiny_model):
    skeleton = Skeleton(tiny_model("llama"))
    assert not _real(skeleton.model)
    with skeleton.loaded("model.layers.1") as block:
        assert _real(skeleton.model) == {f"model.layers.1.{n}" for n, _ in block.named_parameters()}
        expected = tiny_models.build("llama").model.layers[1].state_dict()
        assert all(torch.equal(v, expected[k]) for k, v in block.state_dict().items())
    assert not _real(skeleton.model)


def test_skeleton_frees_after_an_error(tiny_model):
    skeleton = Skeleton(tiny_model("llama"))
    with pytest.raises(KeyError), skeleton.loaded("model.layers.0"):
        raise KeyError
    assert not _real(skeleton.model)


@pytest.mark.parametrize("tied", [True, False])
def test_skeleton_outside_of_blocks(tied, tiny_model):
    skeleton = Skeleton(tiny_model("llama", tie_word_embeddings=tied))
    assert skeleton.tied_head == tied
    with skeleton.loaded_outside(head=False):
        assert _real(skeleton.model) == {"model.embed_tokens.weight", "model.norm.weight"}
    with skeleton.loaded_outside() as model:
        assert "lm_head.weight" in _real(model)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert not _real(skeleton.model)


def test_skeleton_converts_the_dtype(tiny_model):
    skeleton = Skeleton(tiny_model("llama"), dtype=torch.bfloat16)
    with skeleton.loaded("model.layers.0") as block:
        assert {p.dtype for p in block.parameters()} == {torch.bfloat16}


def test_skeleton_reads_base_model_checkpoints(tiny_model, tmp_path):
    whole = tiny_models.build("llama", tie_word_embeddings=True)
    whole.model.save_pretrained(tmp_path)
    skeleton = Skeleton(tmp_path)
    assert not skeleton.whole_model
    assert skeleton.names["model.norm.weight"] == skeleton.checkpoint.names[-1] == "norm.weight"
    assert torch.equal(skeleton.tensor("lm_head.weight"), whole.lm_head.weight)


def test_skeleton_unequal_heads_overrule_a_tied_config(copied):
    tensors = load_file(copied / "model.safetensors")
    assert "lm_head.weight" in tensors
    config = json.loads((copied / "config.json").read_text())
    config["tie_word_embeddings"] = True
    (copied / "config.json").write_text(json.dumps(config))
    assert not Skeleton(copied).tied_head
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, copied / "model.safetensors")
    assert Skeleton(copied).tied_head


def test_skeleton_counts_unused_tensors(copied):
    tensors = load_file(copied / "model.safetensors")
    save_file({**tensors, "extra.bias": torch.ones(1)}, copied / "model.safetensors")
    assert Skeleton(copied).unused == ("extra.bias",)


def test_skeleton_whole_model_when_transformers_must_convert(tmp_path):
    """Mixtral stores experts one by one; transformers fuses them while loading."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
        pad_token_id=None,
    )
    model = MixtralForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    skeleton = Skeleton(tmp_path)
    assert skeleton.whole_model
    kinds = {site.kind: site.input_site.split(".")[-1] for site in skeleton.sites}
    assert kinds == {"q_proj": "q_proj", "k_proj": "q_proj", "v_proj": "q_proj", "o_proj": "o_proj"}
    assert skeleton.names["lm_head.weight"] == "lm_head.weight"
    assert not any("experts" in name for name in skeleton.names)
    with skeleton.loaded("model.layers.0") as block:
        expected = model.model.layers[0].state_dict()
        assert all(torch.equal(v, expected[k]) for k, v in block.state_dict().items())


def test_skeleton_missing_weight_is_refused(copied):
    tensors = load_file(copied / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj"):
        Skeleton(copied)


def test_skeleton_wrong_shape_is_refused(copied):
    tensors = load_file(copied / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(7)
    save_file(tensors, copied / "model.safetensors")
    with pytest.raises(ModelError, match=r"model\.norm\.weight is \(7,\)"):
        Skeleton(copied)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_skeleton_weight_that_is_not_finite_is_named(copied, value):
    tensors = load_file(copied / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(tensors, copied / "model.safetensors")
    skeleton = Skeleton(copied)
    with skeleton.loaded("model.layers.0"):
        pass
    named = pytest.raises(NumericalError, match=r"layers\.1\.mlp\.up_proj\.weight: 1 of")
    with named, skeleton.loaded("model.layers.1"):
        pass
    assert not _real(skeleton.model)


def test_skeleton_quantized_model_is_refused(copied):
    config = json.loads((copied / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="gptq"):
        Skeleton(copied)


@pytest.mark.parametrize(
    "config",
    first(
        5,
        [
            "{",
            "[]",
            "{}",
            '{"model_type": "never_heard_of"}',
            '{"model_type": "x", "auto_map": {"AutoConfig": "evil.Evil"}}',
            '{"model_type": "t5"}',
        ],
    ),
)
def test_skeleton_config_that_is_no_causal_model_is_refused(copied, config):
    (copied / "config.json").write_text(config)
    with pytest.raises(ModelError):
        Skeleton(copied)
