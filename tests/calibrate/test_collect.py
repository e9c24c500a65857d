"""Block-wise statistics are those of the whole model."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from convex_caldera.calibrate.collect import collect
from convex_caldera.errors import DataError, NumericalError, RecipeError
from convex_caldera.models.parameters import slots
from convex_caldera.models.skeleton import Skeleton
from tests import tiny_models
from tests.examples import first

# Float32 forward and products; compared with a float32 forward summed in float64.
_TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def tokens():
    draw = torch.Generator().manual_seed(2)
    return torch.randint(2, tiny_models.VOCABULARY, (5, 24), generator=draw)


def _oracle(model: nn.Module, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Inputs (N, n) of every linear layer of a whole model, by hooks, all kept."""
    seen: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(
                lambda _, args, name=name: seen.update({name: args[0].flatten(0, -2).double()})
            )
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    return seen


def _close(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((actual - expected).abs().max() <= _TOLERANCE * expected.abs().max())


# First those whose blocks differ most; `tests.models.test_blocks` runs all families every time.
FAMILIES = ["llama", "phi3", "opt", "gpt_neox", "mistral", "qwen2", "qwen3", "gemma"]


def test_every_family_is_collected():
    assert set(FAMILIES) == set(tiny_models.FAMILIES)


@pytest.mark.parametrize("family", first(4, FAMILIES))
def test_collect_is_the_oracle(family, tiny_model, tokens):
    seen = _oracle(tiny_models.build(family), tokens)
    skeleton = Skeleton(tiny_model(family))
    blocks = 0
    for block in collect(skeleton, tokens, batch_size=2):
        blocks += 1
        assert {site.input_site for site in block.sites} == set(block.inputs)
        for site in block.sites:
            X = seen[site.name]
            statistics = block.inputs[site.input_site]
            assert statistics.num_tokens == tokens.numel() == len(X)
            assert _close(statistics.second_moment(), X.T @ X / len(X))
            assert _close(statistics.mean_abs.double(), X.abs().mean(0))
    assert blocks == 2


def test_collect_hands_out_real_weights_of_one_block(tiny_model, tokens):
    skeleton = Skeleton(tiny_model("llama"))
    expected = tiny_models.build("llama").state_dict()
    for block in collect(skeleton, tokens):
        for site in block.sites:
            assert torch.equal(block.weight(site), expected[f"{site.name}.weight"])
        real = [slot.name for slot in slots(skeleton.model) if not slot.parameter.is_meta]
        assert all(name.startswith(f"{block.name}.") for name in real) and len(real) == 9
    assert all(slot.parameter.is_meta for slot in slots(skeleton.model))


def test_collect_frees_the_block_when_the_caller_stops(tiny_model, tokens):
    skeleton = Skeleton(tiny_model("llama"))
    blocks = collect(skeleton, tokens)
    next(blocks)
    blocks.close()
    assert all(slot.parameter.is_meta for slot in slots(skeleton.model))


def test_collect_twice_gives_the_same_bits(tiny_model, tokens):
    first, second = (
        [block.inputs for block in collect(tiny_model("llama"), tokens)] for _ in range(2)
    )
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(a[name].packed, b[name].packed) for name in a)


def test_collect_only_some_blocks(tiny_model, tokens):
    skeleton = Skeleton(tiny_model("llama"))
    every = {block.index: block.inputs for block in collect(skeleton, tokens)}
    (last,) = collect(skeleton, tokens, only=[1])
    assert last.index == 1 and last.name == "model.layers.1"
    assert all(torch.equal(last.inputs[k].packed, every[1][k].packed) for k in every[1])
    assert list(collect(skeleton, tokens, only=[])) == []


def test_collect_shares_one_hessian_per_input(tiny_model, tokens):
    (block, _) = collect(tiny_model("llama"), tokens)
    hessians = block.hessians(damping=0.02)
    assert len(hessians) == 4 and len(block.sites) == 7
    assert all(H.damping == 0.02 and H.name == name for name, H in hessians.items())
    assert all("mean_abs" in H.statistics for H in hessians.values())


def test_collect_propagates_compressed_blocks(tiny_model, tokens):
    """Halving a weight in `replace` is halving it in the whole model beforehand."""
    changed = tiny_models.build("llama")
    changed.model.layers[0].mlp.down_proj.weight.data *= 0.5
    seen = _oracle(changed, tokens)
    replaced = []

    def replace(index: int, block: nn.Module) -> None:
        replaced.append(index)
        block.mlp.down_proj.weight.data *= 0.5

    first, second = collect(tiny_model("llama"), tokens, propagate="compressed", replace=replace)
    assert replaced == [0]
    original = [block.inputs for block in collect(tiny_model("llama"), tokens)]
    for name, statistics in first.inputs.items():
        assert torch.equal(statistics.packed, original[0][name].packed)
    for name, statistics in second.inputs.items():
        X = seen[name]
        assert _close(statistics.second_moment(), X.T @ X / len(X))
        assert not _close(original[1][name].second_moment(), X.T @ X / len(X))


def test_collect_reports_every_batch(tiny_model, tokens):
    calls = []
    list(collect(tiny_model("llama"), tokens, batch_size=2, progress=lambda *c: calls.append(c)))
    assert calls == [(index, batch, 3) for index in (0, 1) for batch in range(3)]


def test_collect_names_module_and_sample_of_a_bad_activation(tiny_model, tokens, tmp_path):
    """Gemma multiplies embeddings by the root of the width: one row of 3e38 overflows."""
    path = shutil.copytree(tiny_model("gemma"), tmp_path / "copy")
    tensors = load_file(path / "model.safetensors")
    token = int(tokens[3, 5])
    first = int((tokens == token).any(1).nonzero()[0])
    tensors["model.embed_tokens.weight"][token] = 3e38
    save_file(tensors, path / "model.safetensors")
    expected = rf"model\.layers\.0\.self_attn\.q_proj: activation is .* in sample {first},"
    with pytest.raises(NumericalError, match=expected):
        list(collect(path, tokens, batch_size=2))


def test_collect_refuses_contradictions(tiny_model, tokens):
    path = tiny_model("llama")
    with pytest.raises(RecipeError, match="`replace` goes with"):
        collect(path, tokens, propagate="compressed")
    with pytest.raises(RecipeError, match="`replace` goes with"):
        collect(path, tokens, replace=lambda *_: None)
    with pytest.raises(RecipeError, match="propagate must be"):
        collect(path, tokens, propagate="both")
    with pytest.raises(RecipeError, match="no block 2"):
        collect(path, tokens, only=[0, 2])
    with pytest.raises(RecipeError, match="batch_size"):
        list(collect(path, tokens, batch_size=0))


def test_collect_refuses_layers_that_no_token_reaches(tiny_model, tokens, monkeypatch):
    skeleton = Skeleton(tiny_model("llama"))
    block = skeleton.model.model.layers[0]
    block.mlp.spare = nn.Linear(48, 48)
    with pytest.raises(DataError, match=r"mlp\.spare: no token"):
        list(collect(skeleton, tokens))
