"""Decoder blocks, linear layers and shared inputs, found by structure."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from convex_caldera.errors import ModelError
from convex_caldera.models.meta import load_config, meta_model
from convex_caldera.models.sites import find_blocks, find_structure
from tests import tiny_models

# Of one block: layer -> the layer whose input it shares.
_LLAMA = {
    "self_attn.q_proj": "self_attn.q_proj",
    "self_attn.k_proj": "self_attn.q_proj",
    "self_attn.v_proj": "self_attn.q_proj",
    "self_attn.o_proj": "self_attn.o_proj",
    "mlp.gate_proj": "mlp.gate_proj",
    "mlp.up_proj": "mlp.gate_proj",
    "mlp.down_proj": "mlp.down_proj",
}
_EXPECTED = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma"), _LLAMA),
    "phi3": {
        name: name
        for name in ("self_attn.o_proj", "self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj")
    },
    "opt": {
        "self_attn.k_proj": "self_attn.q_proj",
        "self_attn.v_proj": "self_attn.q_proj",
        "self_attn.q_proj": "self_attn.q_proj",
        "self_attn.out_proj": "self_attn.out_proj",
        "fc1": "fc1",
        "fc2": "fc2",
    },
    "gpt_neox": {
        name: name
        for name in (
            "attention.query_key_value",
            "attention.dense",
            "mlp.dense_h_to_4h",
            "mlp.dense_4h_to_h",
        )
    },
}
_LISTS = {"opt": "model.decoder.layers", "gpt_neox": "gpt_neox.layers"}


def test_families_are_all_expected():
    assert set(_EXPECTED) == set(tiny_models.FAMILIES)


@pytest.mark.parametrize("family", _EXPECTED)
def test_structure_of_family(family, tiny_model):
    model = meta_model(load_config(tiny_model(family)))
    structure = find_structure(model)
    prefix = structure.blocks_name
    assert prefix == _LISTS.get(family, "model.layers")
    assert len(structure.blocks) == 2 and structure.output_length == 0
    for index in (0, 1):
        found = {site.name: site.input_site for site in structure.sites_of(index)}
        wanted = {
            f"{prefix}.{index}.{k}": f"{prefix}.{index}.{v}" for k, v in _EXPECTED[family].items()
        }
        assert found == wanted
    for site in structure.sites:
        linear = model.get_submodule(site.name)
        assert isinstance(linear, nn.Linear)
        assert site.shape == (linear.out_features, linear.in_features) == tuple(linear.weight.shape)
        assert site.kind == site.name.split(".")[-1]
        assert site.has_bias == (linear.bias is not None)
    assert any(site.has_bias for site in structure.sites) == (
        family in ("qwen2", "opt", "gpt_neox")
    )


def test_structure_leaves_parameters_on_meta(tiny_model):
    model = meta_model(load_config(tiny_model("llama")))
    find_structure(model)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any("forward" in block.__dict__ for block in model.model.layers)


def test_structure_of_a_real_model_is_the_same(tiny_model):
    model = meta_model(load_config(tiny_model("qwen2")))
    assert find_structure(model).sites == find_structure(tiny_models.build("qwen2")).sites


def test_meta_model_costs_no_random_state_and_has_real_buffers(tiny_model):
    state = torch.random.get_rng_state()
    model = meta_model(load_config(tiny_model("llama")))
    assert torch.equal(state, torch.random.get_rng_state())
    real = dict(tiny_models.build("llama").named_buffers())
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, real[name])


class _Toy(nn.Module):
    """Blocks that return tuples, share one normalized input, and differ in kind."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(8, 6)
        self.layers = nn.ModuleList(_ToyBlock(width) for width in (6, 6, 9))
        self.small = nn.ModuleList([nn.Sequential(nn.Linear(2, 2))])

    def forward(self, input_ids, use_cache):
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden_states=hidden)[0]
        return hidden


class _ToyBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.first = nn.Linear(6, width)
        self.second = nn.Linear(6, width)
        self.third = nn.Linear(6, width)
        self.out = nn.Linear(width, 6)
        self.unused = nn.Linear(6, 6)

    def forward(self, hidden_states):
        flat = hidden_states.flatten(0, 1)
        a, b = self.first(hidden_states), self.second(flat).view(*hidden_states.shape[:2], -1)
        hidden_states = hidden_states.mul_(1.0)
        return hidden_states + self.out(a + b + self.third(hidden_states)), None


def test_structure_of_tuple_blocks_views_and_writes():
    structure = find_structure(_Toy())
    assert structure.blocks_name == "layers" and structure.output_length == 2
    for index in (0, 1, 2):
        readers = {site.kind: site.input_site.split(".")[-1] for site in structure.sites_of(index)}
        # `third` reads the same memory after a write in between; `unused` reads nothing.
        assert readers == {
            "first": "first",
            "second": "first",
            "third": "third",
            "out": "out",
            "unused": "unused",
        }
    assert {site.shape for site in structure.sites_of(2)} == {(9, 6), (6, 9), (6, 6)}


def test_model_without_decoder_blocks_is_refused():
    with pytest.raises(ModelError, match="no decoder blocks"):
        find_blocks(nn.Sequential(nn.Linear(3, 3), nn.ModuleList([nn.Conv1d(1, 1, 1)])))


def test_model_of_convolutions_is_refused(tmp_path):
    from transformers import GPT2Config

    model = meta_model(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32))
    with pytest.raises(ModelError, match="no decoder blocks"):
        find_structure(model)
