from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from convex_caldera.errors import DataError, RecipeError
from convex_caldera.evaluate.windows import token_windows
from tests.evaluate.tiny import TEXT, byte_tokenizer
from tests.examples import examples

TOKENIZERS = {bos: byte_tokenizer(bos) for bos in (True, False)}


@examples(60)
@given(
    length=st.integers(2, 90),
    window=st.integers(2, 40),
    share=st.floats(0, 1),
    bos=st.booleans(),
    size=st.integers(1, 5),
)
def test_windows_score_each_token_at_most_once_and_with_its_context(
    length, window, share, bos, size
):
    stride = 1 + int(share * (window - 1))
    text = "".join(chr(33 + i % 90) for i in range(length))
    cut = token_windows(text, TOKENIZERS[bos], window, stride)
    scored = []
    for batch in cut.batches(size):
        assert batch.ids.shape[1] <= window
        assert len(batch.windows) <= size
        for row, index in enumerate(batch.windows):
            span = cut.spans[index]
            scored += range(span.first, span.end)
            # The targets are the last ids the model reads, and something comes before them.
            num_targets = batch.targets.shape[1]
            assert torch.equal(batch.ids[row, -num_targets:], batch.targets[row])
            assert batch.ids.shape[1] > num_targets
            assert torch.equal(batch.targets[row], cut.ids[span.first : span.end])
    assert scored == sorted(set(scored))
    assert len(scored) == cut.protocol.tokens
    if bos:
        assert scored == list(range(length))
    elif stride < window:
        assert scored == list(range(1, length))


def test_windows_without_overlap_or_bos_leave_out_each_first_token():
    cut = token_windows("abcdefghij", TOKENIZERS[False], 4, 4)
    assert [(s.begin, s.first, s.end) for s in cut.spans] == [(0, 1, 4), (4, 5, 8), (8, 9, 10)]
    assert not cut.protocol.bos


def test_windows_with_bos_hold_one_text_token_less():
    cut = token_windows("abcdefg", TOKENIZERS[True], 4, 4)
    assert [(s.begin, s.first, s.end) for s in cut.spans] == [(0, 0, 3), (3, 3, 6), (6, 6, 7)]
    first = next(cut.batches(8))
    assert first.ids.tolist() == [[256, *cut.ids[:3].tolist()], [256, *cut.ids[3:6].tolist()]]
    plain = token_windows("abcdefg", TOKENIZERS[True], 4, 4, bos=False)
    assert plain.bos_id is None
    assert not plain.protocol.bos


def test_windows_that_slide_score_only_the_new_tokens():
    cut = token_windows("abcdefg", TOKENIZERS[False], 4, 2)
    assert [(s.begin, s.first, s.end) for s in cut.spans] == [(0, 1, 4), (2, 4, 6), (4, 6, 7)]


def test_protocol_counts_the_bytes_of_the_scored_tokens():
    whole = token_windows(TEXT, TOKENIZERS[True], 32, 32)
    assert whole.protocol.scored_bytes == len(TEXT.encode())
    # One token per byte, but an offset knows whole characters only: "漢" is three tokens, and
    # the first of them is given its three bytes.
    some = token_windows("ab漢cd", TOKENIZERS[False], 64, 64)
    assert some.protocol.text_tokens == 7
    assert some.protocol.scored_bytes == 6


def test_protocol_names_the_tokens_and_prints_the_rule():
    one = token_windows("abcdefg", TOKENIZERS[True], 4, 2).protocol
    assert one == token_windows("abcdefg", TOKENIZERS[True], 4, 2).protocol
    other = token_windows("abcdefh", TOKENIZERS[True], 4, 2).protocol
    assert one.tokens_sha256 != other.tokens_sha256
    assert str(one) == (
        "window 4, stride 2, BOS before each window; 7 of 7 tokens scored in 3 windows"
    )


def test_max_tokens_shortens_the_text():
    cut = token_windows(TEXT, TOKENIZERS[True], 32, 32, max_tokens=50)
    assert cut.protocol.text_tokens == 50
    assert cut.protocol.scored_bytes == 50


@pytest.mark.parametrize(("window", "stride"), [(1, 1), (8, 0), (8, 9)])
def test_windows_refuse_impossible_sizes(window, stride):
    with pytest.raises(RecipeError, match=f"window {window}, stride {stride}"):
        token_windows(TEXT, TOKENIZERS[True], window, stride)


@pytest.mark.parametrize(("text", "bos"), [("", True), ("a", False)])
def test_windows_refuse_a_text_with_nothing_to_score(text, bos):
    with pytest.raises(DataError, match=f"has {len(text)} tokens"):
        token_windows(text, TOKENIZERS[bos], 8, 8)
