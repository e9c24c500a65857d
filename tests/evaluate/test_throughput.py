from __future__ import annotations

import math

import pytest
import torch

from convex_caldera.errors import NumericalError, RecipeError
from convex_caldera.evaluate.throughput import measure_throughput, memory_bandwidth, weight_bytes
from tests.evaluate.tiny import tiny_llama

MODEL = tiny_llama()


def test_figures_follow_from_the_seconds():
    row = measure_throughput(
        "tiny", MODEL, 3, prompt_tokens=10, new_tokens=4, repeats=1, bandwidth=1e9
    )
    assert row.prefill_tokens_per_second == pytest.approx(30 / row.prefill_seconds)
    assert row.decode_tokens_per_second == pytest.approx(3 / row.decode_seconds)
    assert row.roofline_share == pytest.approx(weight_bytes(MODEL) / 1e9 / row.decode_seconds)
    assert row.peak_memory_bytes is None  # of the process, on a CPU


def test_weights_are_counted_once():
    parameters = sum(p.numel() * 4 for p in MODEL.parameters())
    buffers = sum(
        b.numel() * b.element_size() for b in {b.data_ptr(): b for b in MODEL.buffers()}.values()
    )
    assert weight_bytes(MODEL) == parameters + buffers
    tied = tiny_llama()
    tied.lm_head.weight = tied.model.embed_tokens.weight
    assert weight_bytes(MODEL) - weight_bytes(tied) == 258 * 32 * 4


def test_bandwidth_is_that_of_a_memory():
    assert 1e7 < memory_bandwidth() < 1e13


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"prompt_tokens": 120}, {"repeats": 0}])
def test_sizes_out_of_range_are_refused(wrong):
    sizes = {"batch": 1, "prompt_tokens": 8, "new_tokens": 10, "repeats": 1, **wrong}
    with pytest.raises(RecipeError, match=r"throughput needs|reads at most 128"):
        measure_throughput("tiny", MODEL, sizes.pop("batch"), **sizes, bandwidth=1e9)


def test_nan_logits_are_refused():
    broken = tiny_llama()
    with torch.no_grad():
        broken.model.norm.weight[0] = math.nan
    with pytest.raises(NumericalError, match="tiny: logits are NaN"):
        measure_throughput("tiny", broken, 1, prompt_tokens=4, new_tokens=2, bandwidth=1e9)
