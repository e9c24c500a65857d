"""Running block by block is running the model."""

from __future__ import annotations

import pytest
import torch

from convex_caldera.errors import DataError
from convex_caldera.models.blocks import HiddenStates, iterate_blocks
from convex_caldera.models.parameters import slots
from convex_caldera.models.skeleton import Skeleton
from tests import tiny_models

# Same arithmetic in the same order, but batches of other sizes may be blocked otherwise.
_TOLERANCE = 1e-5


def _tokens(samples: int = 5, length: int = 24) -> torch.Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randint(2, tiny_models.VOCABULARY, (samples, length), generator=draw)


def _whole(family: str, tokens: torch.Tensor, **options) -> torch.Tensor:
    with torch.no_grad():
        return tiny_models.build(family, **options)(input_ids=tokens, use_cache=False).logits


def _blockwise(skeleton: Skeleton, tokens: torch.Tensor, **options) -> torch.Tensor:
    states = HiddenStates(skeleton, tokens, batch_size=2, **options)
    for index, block in iterate_blocks(skeleton):
        states.advance(index, block)
    return torch.cat(list(states.logits()))


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_blockwise_forward_is_the_model(family, tied, tiny_model):
    path = tiny_model(family, tie_word_embeddings=tied)
    expected = _whole(family, _tokens(), tie_word_embeddings=tied)
    assert expected.abs().max() > 0.1
    logits = _blockwise(Skeleton(path), _tokens())
    torch.testing.assert_close(logits, expected, rtol=_TOLERANCE, atol=_TOLERANCE)


@pytest.mark.parametrize("family", tiny_models.FURTHER)
def test_blockwise_forward_of_further_families(family, tiny_model):
    skeleton = Skeleton(tiny_model(family))
    assert (skeleton.structure.output_length > 0) == (family in ("bloom", "falcon"))
    logits = _blockwise(skeleton, _tokens())
    torch.testing.assert_close(logits, _whole(family, _tokens()), rtol=_TOLERANCE, atol=_TOLERANCE)


def test_blockwise_forward_of_windows_that_differ_by_layer(tiny_model):
    """Qwen2 with sliding attention in the upper layer only: every block has its own mask."""
    options = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    path = tiny_model("qwen2", **options)
    expected = _whole("qwen2", _tokens(), **options)
    assert not torch.allclose(expected, _whole("qwen2", _tokens()), atol=1e-3)
    logits = _blockwise(Skeleton(path), _tokens())
    torch.testing.assert_close(logits, expected, rtol=_TOLERANCE, atol=_TOLERANCE)


def test_blockwise_forward_of_shards(tiny_model):
    logits = _blockwise(Skeleton(tiny_model("llama", shard="64KB")), _tokens())
    torch.testing.assert_close(logits, _whole("llama", _tokens()), rtol=_TOLERANCE, atol=_TOLERANCE)


def test_blockwise_forward_does_not_depend_on_the_batch(tiny_model):
    skeleton = Skeleton(tiny_model("llama"))
    one = HiddenStates(skeleton, _tokens(), batch_size=1)
    all_at_once = HiddenStates(skeleton, _tokens(), batch_size=8)
    with skeleton.loaded("model.layers.0") as block:
        rows = torch.cat([one.output(0, block, batch) for batch in range(len(one))])
        together = all_at_once.output(0, block, 0)
    torch.testing.assert_close(rows, together, rtol=_TOLERANCE, atol=_TOLERANCE)
    assert [one.samples(i) for i in (0, 4)] == [range(1), range(4, 5)]


def test_blocks_are_in_memory_one_at_a_time(tiny_model):
    skeleton = Skeleton(tiny_model("llama"))
    states = HiddenStates(skeleton, _tokens())
    for index, block in iterate_blocks(skeleton):
        states.advance(index, block)
        real = [slot.name for slot in slots(skeleton.model) if not slot.parameter.is_meta]
        assert real == [f"model.layers.{index}.{name}" for name, _ in block.named_parameters()]
    assert all(slot.parameter.is_meta for slot in slots(skeleton.model))


def test_hidden_states_in_bfloat16_are_close(tiny_model):
    skeleton = Skeleton(tiny_model("llama"))
    states = HiddenStates(skeleton, _tokens(), store=torch.bfloat16)
    full = HiddenStates(skeleton, _tokens())
    assert torch.equal(states.hidden(0), full.hidden(0).bfloat16().float())
    assert states.hidden(0).dtype == torch.float32


@pytest.mark.parametrize(
    "tokens",
    [
        torch.zeros(0, 4, dtype=torch.int64),
        torch.zeros(4, dtype=torch.int64),
        torch.zeros(2, 4),
        torch.full((2, 4), tiny_models.VOCABULARY),
        torch.full((2, 4), -1),
    ],
)
def test_hidden_states_refuse_bad_tokens(tokens, tiny_model):
    with pytest.raises(DataError):
        HiddenStates(Skeleton(tiny_model("llama")), tokens)
