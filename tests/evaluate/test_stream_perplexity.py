from __future__ import annotations

import math

import pytest
import torch

from convex_caldera.errors import DataError, NumericalError, RecipeError
from convex_caldera.evaluate.stream_perplexity import (
    perplexity_of,
    stream_perplexity,
    stream_text,
)
from tests.evaluate.tiny import TEXT, byte_tokenizer, tiny_llama

MODEL = tiny_llama(2)
TOLERANCE = 1e-4  # relative, the figure promised


def literal(model, tokenizer, text, window):
    """The papers' protocol in a plain loop, one window and one token at a time."""
    head = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = head + tokenizer(text, add_special_tokens=False)["input_ids"]
    means = []
    for start in range(0, len(ids) - window + 1, window):
        tokens = ids[start : start + window]
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0].double()
        losses = []
        for place in range(1, window):
            logp = logits[place - 1] - logits[place - 1].logsumexp(0)
            losses.append(-logp[tokens[place]].item())
        means.append(sum(losses) / len(losses))
    return math.exp(sum(means) / len(means)), means


@pytest.mark.parametrize("window", [17, 64])
@pytest.mark.parametrize("bos", [True, False])
def test_stream_perplexity_equals_a_literal_loop(window, bos):
    tokenizer = byte_tokenizer(bos)
    expected, means = literal(MODEL, tokenizer, TEXT, window)
    score = stream_perplexity("tiny", MODEL, tokenizer, TEXT, window=window)
    assert score.perplexity == pytest.approx(expected, rel=TOLERANCE)
    assert score.window_nats == pytest.approx(means, abs=TOLERANCE)
    assert score.tokens == len(means) * (window - 1)
    spread = torch.tensor(means, dtype=torch.float64).std().item() / math.sqrt(len(means))
    assert score.stderr == pytest.approx(expected * spread, rel=1e-3)


def test_stream_perplexity_does_not_depend_on_batches_and_reports_progress():
    seen = []
    one = stream_perplexity(
        "tiny", MODEL, byte_tokenizer(), TEXT, window=32, batch_size=5, limit=12,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    all_at_once = stream_perplexity("tiny", MODEL, byte_tokenizer(), TEXT, window=32, limit=12)
    assert one.window_nats == pytest.approx(all_at_once.window_nats, abs=1e-5)
    assert seen == [(5, 12), (10, 12), (12, 12)]


def test_stream_text_joins_as_the_papers_do():
    pages = [{"page": " \n = A = \n"}, {"page": " text \n"}]
    assert stream_text("wikitext2", pages) == "\n\n = A = \n\n\n text \n"
    assert stream_text("c4", [{"text": "a"}, {"text": "b"}]) == "a b"
    assert stream_text("c4", [{"text": "a"}] * 2000) == " ".join("a" * 1100)


def test_stream_perplexity_refuses_what_it_cannot_score():
    with pytest.raises(RecipeError, match="128 tokens but the window is 200"):
        stream_perplexity("tiny", MODEL, byte_tokenizer(), TEXT, window=200)
    with pytest.raises(DataError, match="not one window of 32"):
        stream_perplexity("tiny", MODEL, byte_tokenizer(), "short", window=32)
    broken = tiny_llama(2)
    with torch.no_grad():
        broken.model.norm.weight[0] = math.nan
    with pytest.raises(NumericalError, match=r"tiny: .* window 0"):
        stream_perplexity("tiny", broken, byte_tokenizer(), TEXT, window=32)
    with pytest.raises(NumericalError, match="800 nats"):
        perplexity_of(800.0, "tiny")
