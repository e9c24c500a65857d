"""Input embedding and output head as sites: one where they are tied, two where they are not."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from convex_caldera.models.blocks import HiddenStates
from convex_caldera.models.embeddings import OUTSIDE
from convex_caldera.models.parameters import slots
from convex_caldera.models.skeleton import Skeleton
from tests import tiny_models
from tests.tiny_models import VOCABULARY

NAMES = {
    "llama": ("model.embed_tokens", "lm_head"),
    "opt": ("model.decoder.embed_tokens", "lm_head"),
    "gpt_neox": ("gpt_neox.embed_in", "embed_out"),  # old names, as files keep them
    "gemma": ("model.embed_tokens", "lm_head"),
}


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_are_one_variable_where_tied_and_two_where_not(family, tied, tiny_model):
    skeleton = Skeleton(tiny_model(family, tie_word_embeddings=tied, num_hidden_layers=1))
    sites = skeleton.embeddings
    lookup, head = NAMES[family]
    assert [site.name for site in sites] == ([lookup] if tied else [lookup, head])
    assert [site.uses for site in sites] == (
        [("lookup", "head")] if tied else [("lookup",), ("head",)]
    )
    assert {site.shape for site in sites} == {(VOCABULARY, 48)}
    assert {site.block for site in sites} == {OUTSIDE}
    assert not set(skeleton.sites) & set(sites)


@pytest.mark.parametrize("tied", [True, False])
def test_substituted_embeddings_are_read_in_all_their_places(tied, tiny_model):
    skeleton = Skeleton(tiny_model("llama", tie_word_embeddings=tied, num_hidden_layers=1))
    tokens = torch.arange(8)[None]
    before = HiddenStates(skeleton, tokens).hidden(0)
    doubled = 2 * skeleton.tensor("model.embed_tokens.weight")
    with skeleton.substituted({"model.embed_tokens.weight": doubled}):
        assert torch.equal(HiddenStates(skeleton, tokens).hidden(0), 2 * before)
        with skeleton.loaded_outside() as model:
            assert torch.equal(model.lm_head.weight, doubled) == tied
    assert all(slot.parameter.is_meta for slot in slots(skeleton.model))
    assert torch.equal(HiddenStates(skeleton, tokens).hidden(0), before)


def test_embeddings_of_base_model_checkpoints_have_the_names_of_the_files(tmp_path):
    whole = tiny_models.build("llama", tie_word_embeddings=True, num_hidden_layers=1)
    whole.model.save_pretrained(tmp_path)
    skeleton = Skeleton(tmp_path)
    (site,) = skeleton.embeddings
    assert (site.name, site.parameter) == ("embed_tokens", "model.embed_tokens")
    assert torch.equal(skeleton.tensor("embed_tokens.weight"), whole.lm_head.weight)


def test_embeddings_that_a_checkpoint_holds_twice_are_one_and_a_copy(tiny_model, tmp_path):
    path = shutil.copytree(tiny_model("llama"), tmp_path / "copy")
    tensors = load_file(path / "model.safetensors")
    config = json.loads((path / "config.json").read_text()) | {"tie_word_embeddings": True}
    (path / "config.json").write_text(json.dumps(config))
    assert len(Skeleton(path).embeddings) == 2  # different values overrule the configuration
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path / "model.safetensors")
    (site,) = Skeleton(path).embeddings
    assert (site.name, site.copies) == ("model.embed_tokens", ("lm_head.weight",))
