from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from convex_caldera.errors import NumericalError, RecipeError, ShapeError
from convex_caldera.evaluate import Candidate, evaluate
from convex_caldera.evaluate.divergence import token_scores
from convex_caldera.evaluate.standard_error import clustered_mean
from tests.evaluate.tiny import TEXT, byte_tokenizer, perturbed, tiny_llama
from tests.examples import first
from tests.oracles.evaluation import evaluate_literally

# float32 logits and softmax against a float64 loop.
TOLERANCE = 1e-4
ORIGINAL = tiny_llama()
NEAR, FAR = perturbed(ORIGINAL, 0.03), perturbed(ORIGINAL, 0.3)


def candidates(*models):
    names = ["original", *(f"model {i}" for i in range(1, len(models)))]
    return [Candidate(n, lambda m=m: m) for n, m in zip(names, models, strict=True)]


@pytest.mark.parametrize(
    ("window", "stride", "bos"),
    first(1, [(24, 9, True), (32, 32, True), (24, 9, False), (32, 32, False)]),
)
def test_evaluation_equals_a_literal_loop(window, stride, bos):
    tokenizer = byte_tokenizer(bos)
    result = evaluate(candidates(ORIGINAL, NEAR), TEXT, tokenizer, window=window, stride=stride)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    for score, model in zip(result, (ORIGINAL, NEAR), strict=True):
        nats, kl, same, count = evaluate_literally(
            ORIGINAL, model, ids, window, stride, tokenizer.bos_token_id
        )
        assert score.tokens == count
        assert score.nats_per_token == pytest.approx(nats, abs=TOLERANCE)
        assert score.perplexity == pytest.approx(math.exp(nats), rel=TOLERANCE)
        assert score.kl == pytest.approx(kl, abs=TOLERANCE)
        assert score.top1_agreement == pytest.approx(same, abs=1e-12)
        assert score.bits_per_byte == pytest.approx(
            nats * count / math.log(2) / result.protocol.scored_bytes, rel=TOLERANCE
        )


def test_evaluation_errors_are_those_of_resampled_windows():
    tokenizer = byte_tokenizer()
    near = evaluate(candidates(ORIGINAL, NEAR), TEXT, tokenizer, window=17)[1]
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    parts = [ids[start : start + 16] for start in range(0, len(ids), 16)]
    each = [evaluate_literally(ORIGINAL, NEAR, part, 17, 17, 256) for part in parts]
    sums = np.array([(n * nats, n * kl, n * same, n) for nats, kl, same, n in each])
    picks = np.random.default_rng(0).integers(len(parts), size=(4000, len(parts)))
    nats, kl, same, count = sums[picks].sum(1).T
    # 4000 resamples know a deviation to 1.1 %; the bootstrap itself lacks C / (C - 1).
    assert near.perplexity_stderr == pytest.approx(np.exp(nats / count).std(), rel=0.1)
    assert near.kl_stderr == pytest.approx((kl / count).std(), rel=0.1)
    assert near.top1_stderr == pytest.approx((same / count).std(), rel=0.1)


def test_evaluation_of_a_model_against_itself_finds_no_divergence():
    same = evaluate(candidates(ORIGINAL, ORIGINAL), TEXT, byte_tokenizer(), window=64)[1]
    assert (same.kl, same.kl_stderr, same.top1_agreement, same.top1_stderr) == (0, 0, 1, 0)


def test_evaluation_ranks_models_by_their_distance():
    original, near, far = evaluate(
        candidates(ORIGINAL, NEAR, FAR), TEXT, byte_tokenizer(), window=64
    )
    assert 0 == original.kl < near.kl < far.kl
    assert 1 == original.top1_agreement > near.top1_agreement > far.top1_agreement


def test_evaluation_does_not_depend_on_the_batch_or_the_company():
    tokenizer = byte_tokenizer()
    many = evaluate(candidates(ORIGINAL, FAR, NEAR), TEXT, tokenizer, window=40, batch_size=5)
    one = evaluate(candidates(ORIGINAL, NEAR), TEXT, tokenizer, window=40, batch_size=1)
    assert many[2].nats_per_token == pytest.approx(one[1].nats_per_token, abs=1e-5)
    assert many[2].kl == pytest.approx(one[1].kl, abs=1e-6)
    assert many.protocol == one.protocol


def test_evaluation_reports_progress_and_sizes_as_given():
    seen = []
    given = [
        Candidate("original", lambda: ORIGINAL, file_bytes=100, bits_per_compressed_weight=32.0),
        Candidate("near", lambda: NEAR),
    ]
    result = evaluate(
        given,
        TEXT,
        byte_tokenizer(),
        window=64,
        batch_size=3,
        progress=lambda *state: seen.append(state),
    )
    total = result.protocol.windows
    assert [done for done, _, _ in seen] == [*range(3, total, 3), total]
    assert {of for _, of, _ in seen} == {total}
    assert all(left >= 0 for _, _, left in seen)
    assert seen[-1][2] == 0
    assert (result[0].file_bytes, result[0].bits_per_compressed_weight) == (100, 32.0)
    assert (result[1].file_bytes, result[1].bits_per_compressed_weight) == (None, None)
    back = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert back["models"][1]["kl"] == result[1].kl
    assert (back["protocol"]["window"], back["protocol"]["stride"]) == (64, 64)


def test_evaluation_leaves_the_models_as_they_were():
    model = tiny_llama(3)
    model.train()
    model.model.layers[0].eval()
    evaluate(candidates(model), TEXT, byte_tokenizer(), window=64)
    assert model.training
    assert not model.model.layers[0].training
    assert model.model.layers[1].training
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_evaluation_names_the_model_and_window_of_bad_logits(value):
    class Spoiled(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.calls = ORIGINAL, 0

        def forward(self, input_ids, use_cache):
            output = self.inner(input_ids=input_ids, use_cache=use_cache)
            self.calls += 1
            if self.calls == 2:
                output.logits[1, 5, 7] = value
            return output

    with pytest.raises(NumericalError, match=r"model 1: .* in window 4 of .* at token 257 "):
        evaluate(candidates(ORIGINAL, Spoiled()), TEXT, byte_tokenizer(), window=64, batch_size=3)


def test_evaluation_refuses_what_cannot_be_compared():
    tokenizer = byte_tokenizer()
    with pytest.raises(ShapeError, match="model 1 predicts 260 tokens but original 258"):
        evaluate(candidates(ORIGINAL, tiny_llama(vocabulary=260)), TEXT, tokenizer, window=64)
    with pytest.raises(RecipeError, match="--window 128"):
        evaluate(candidates(ORIGINAL), TEXT, tokenizer, window=256, stride=256)
    with pytest.raises(RecipeError, match="different names"):
        evaluate([Candidate("a", lambda: ORIGINAL)] * 2, TEXT, tokenizer, window=64)
    with pytest.raises(RecipeError, match="different names"):
        evaluate([], TEXT, tokenizer, window=64)


def test_token_scores_do_not_depend_on_the_slices(monkeypatch):
    source = torch.Generator().manual_seed(0)
    p, q = (torch.randn(3, 7, 11, generator=source) for _ in range(2))
    targets = torch.randint(11, (3, 7), generator=source)
    whole = token_scores(q, targets, p)
    monkeypatch.setattr("convex_caldera.evaluate.divergence.CPU_SLICE", 25)
    sliced = token_scores(q, targets, p)
    for name in ("nats", "kl", "agreement"):
        assert getattr(sliced, name).shape == (3, 7)
        torch.testing.assert_close(getattr(sliced, name), getattr(whole, name))
    assert (whole.kl > 0).all()


def test_token_scores_let_both_models_rule_a_token_out():
    p = torch.tensor([[0.0, 1.0, -torch.inf]])
    scores = token_scores(p.clone(), torch.tensor([1]), p)
    assert scores.kl.item() == 0
    # The original may rule out what the other allows; the reverse is an infinite divergence.
    q = torch.tensor([[0.0, 1.0, 0.0]])
    assert 0 < token_scores(q, torch.tensor([1]), p).kl.item() < 1
    assert token_scores(p, torch.tensor([1]), q).kl.item() == math.inf


def test_clustered_mean_of_equal_windows_is_the_textbook_error_of_their_means():
    means = np.random.default_rng(0).normal(size=20)
    estimate = clustered_mean(torch.tensor(means * 7), torch.full((20,), 7))
    assert estimate.mean == pytest.approx(means.mean())
    assert estimate.stderr == pytest.approx(means.std(ddof=1) / math.sqrt(20))


def test_clustered_mean_covers_the_truth_where_a_token_error_would_not():
    """Windows with a common offset: the error must see the windows, not the tokens."""
    source = torch.Generator().manual_seed(1)
    offsets = torch.randn(400, 30, 1, generator=source)
    tokens = offsets + 0.1 * torch.randn(400, 30, 50, generator=source)
    counts = torch.full((30,), 50)
    inside = [
        abs(e.mean) < 2 * e.stderr for e in (clustered_mean(t.sum(1), counts) for t in tokens)
    ]
    assert 0.90 < np.mean(inside) < 0.99


def test_clustered_mean_of_one_window_has_no_error():
    estimate = clustered_mean(torch.tensor([6.0]), torch.tensor([3]))
    assert (estimate.mean, estimate.stderr) == (2.0, None)
