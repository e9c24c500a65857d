"""Token windows of a text, with the protocol written down.

Perplexity depends on the protocol as much as on the model: the same checkpoint scores 5.47 or
5.12 for windows of 2048 or 4096, and a missing BOS token can triple it. So the cut is made
once, here, for all models of a comparison, and the result says how:

* a window holds `window` token ids, the BOS token included;
* windows begin `stride` tokens apart; where they overlap, a token is scored only in the first
  window that contains it, the rest is context;
* with BOS, every window begins with it and every token of the text is scored once; without,
  the first token of a window has no context and is not scored there;
* the last, shorter window is kept; no padding, no attention mask.

CALDERA and QuIP# differ: window 4096, no overlap, one BOS at the start of the whole stream,
remainder dropped; figures of the two protocols must not be compared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor

from convex_caldera.errors import DataError, RecipeError


@dataclass(frozen=True)
class Protocol:
    """What was scored and how; two evaluations compare only if these are equal.

    `tokens` counts scored tokens, `scored_bytes` their UTF-8 bytes in the text (None if the
    tokenizer cannot say which), `tokens_sha256` identifies the ids of the whole text.
    """

    window: int
    stride: int
    bos: bool
    windows: int
    tokens: int
    text_tokens: int
    scored_bytes: int | None
    tokens_sha256: str

    def __str__(self) -> str:
        head = "BOS before each window" if self.bos else "no BOS"
        return (
            f"window {self.window}, stride {self.stride}, {head}; "
            f"{self.tokens} of {self.text_tokens} tokens scored in {self.windows} windows"
        )


@dataclass(frozen=True)
class Span:
    """One window: text tokens `begin` to `end`, of which those from `first` on are scored."""

    begin: int
    first: int
    end: int


@dataclass(frozen=True)
class Batch:
    """Windows of equal shape: the model reads `ids` (B, T) and predicts its last columns.

    `targets` (B, P) are the scored tokens; the logits that predict them are
    logits[:, T - P - 1 : T - 1].
    """

    windows: range
    ids: Tensor
    targets: Tensor

    def predictions(self, logits: Tensor) -> Tensor:
        """The rows of logits (B, T, V) that predict the targets, (B, P, V)."""
        length, scored = self.ids.shape[1], self.targets.shape[1]
        return logits[:, length - scored - 1 : length - 1]


@dataclass(frozen=True, eq=False)
class Windows:
    """A text as token ids and the spans to score; made by `token_windows`."""

    ids: Tensor
    spans: tuple[Span, ...]
    bos_id: int | None
    protocol: Protocol

    def batches(self, size: int) -> Iterator[Batch]:
        """All windows in order, at most `size` at a time, equal shapes together."""

        def shape(index: int) -> tuple[int, int]:
            span = self.spans[index]
            return span.end - span.begin, span.end - span.first

        for _, run in groupby(range(len(self.spans)), key=shape):
            indices = list(run)
            for start in range(0, len(indices), size):
                part = indices[start : start + size]
                yield self._batch(range(part[0], part[-1] + 1))

    def _batch(self, windows: range) -> Batch:
        spans = self.spans[windows.start : windows.stop]
        ids = torch.stack([self.ids[s.begin : s.end] for s in spans])
        if self.bos_id is not None:
            head = torch.full((len(spans), 1), self.bos_id, dtype=ids.dtype)
            ids = torch.cat([head, ids], dim=1)
        targets = torch.stack([self.ids[s.first : s.end] for s in spans])
        return Batch(windows, ids, targets)


def token_windows(
    text: str,
    tokenizer: Any,
    window: int = 512,
    stride: int | None = None,
    *,
    bos: bool = True,
    max_tokens: int | None = None,
) -> Windows:
    """Cut a text into windows to be scored; see the module for the rules.

    Args:
        text: plain text, tokenized as it is, without special tokens.
        tokenizer: a transformers tokenizer.
        window: token ids per window, BOS included.
        stride: distance of windows; by default the window, which means no overlap.
        bos: put the BOS token before each window, if the tokenizer defines one.
        max_tokens: use only so many tokens from the start of the text.

    Raises:
        RecipeError: window or stride is too small, or the stride is larger than the window.
        DataError: the text has too few tokens to score one.
    """
    stride = window if stride is None else stride
    if window < 2 or not 1 <= stride <= window:
        raise RecipeError(
            f"evaluation needs window >= 2 and 1 <= stride <= window, got window {window}, "
            f"stride {stride}"
        )
    bos_id = tokenizer.bos_token_id if bos else None
    numbers, byte_ends = _tokenize(text, tokenizer)
    numbers = numbers[:max_tokens]
    spans = _spans(len(numbers), window, stride, bos_id is not None)
    if not spans:
        raise DataError(
            f"the evaluation text has {len(numbers)} tokens, too few to score one; give more text"
        )
    ids = torch.tensor(numbers, dtype=torch.int64)
    protocol = Protocol(
        window=window,
        stride=stride,
        bos=bos_id is not None,
        windows=len(spans),
        tokens=sum(s.end - s.first for s in spans),
        text_tokens=len(numbers),
        scored_bytes=_scored_bytes(spans, byte_ends),
        tokens_sha256=hashlib.sha256(ids.numpy().astype("<i8").tobytes()).hexdigest(),
    )
    return Windows(ids, spans, bos_id, protocol)


def _spans(num_tokens: int, window: int, stride: int, bos: bool) -> tuple[Span, ...]:
    held = window - bos
    step = min(stride, held)
    spans, scored = [], 0
    for begin in range(0, num_tokens, step):
        end = min(begin + held, num_tokens)
        first = max(scored, begin if bos else begin + 1)
        if first < end:
            spans.append(Span(begin, first, end))
        scored = end
        if end == num_tokens:
            break
    return tuple(spans)


def _tokenize(text: str, tokenizer: Any) -> tuple[list[int], list[int] | None]:
    """Token ids, and for each the number of UTF-8 bytes of the text up to its end."""
    fast = getattr(tokenizer, "is_fast", False)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=fast, verbose=False)
    if not fast:
        return list(encoded["input_ids"]), None
    # Tokens that share a character (its bytes are split between them) end at the same place;
    # the running maximum gives that character's bytes to the first of them, none twice.
    ends = list(accumulate((end for _, end in encoded["offset_mapping"]), max))
    before = [0, *accumulate(len(character.encode()) for character in text)]
    return list(encoded["input_ids"]), [before[end] for end in ends]


def _scored_bytes(spans: tuple[Span, ...], byte_ends: list[int] | None) -> int | None:
    if byte_ends is None:
        return None
    before = [0, *byte_ends]
    return sum(before[span.end] - before[span.first] for span in spans)
