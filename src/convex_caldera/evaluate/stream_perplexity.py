"""Perplexity per token as the papers report it: one stream, windows without overlap.

CALDERA, QuIP#, GPTQ, LQER: the text is tokenized whole with BOS at its very start only, cut
into windows of `window` ids without overlap, the remainder dropped; each window predicts its
window - 1 later tokens, and the figure is exp of the mean of the windows' mean losses. It depends
on the window (Llama-2-7B in fp16: 5.47 at 2048, 5.12 at 4096), so the window is part of its name,
and it is not comparable with perplexity per word (lm-evaluation-harness) or with the windows of
`windows.py`, each of which begins with BOS.

WikiText-2 is its lines joined by blank lines; C4 is the first 1,100 documents joined by spaces and
cut after 256 windows ("c4_new" in the papers' code).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from convex_caldera.errors import DataError, NumericalError, RecipeError
from convex_caldera.evaluate.compare import BATCH_ENTRIES

C4_DOCUMENTS, C4_WINDOWS = 1100, 256


@dataclass(frozen=True)
class StreamScore:
    """Perplexity per token, its standard error over windows, and the mean loss of each window."""

    perplexity: float
    stderr: float | None
    window: int
    tokens: int
    window_nats: list[float]


def stream_text(task: str, documents: Sequence[dict[str, Any]]) -> str:
    """The one text of a task's documents, joined as the papers join it."""
    if task == "wikitext2":
        lines = [line for d in documents for line in d["page"].splitlines(keepends=True)]
        return "\n\n".join(line if line.strip() else "" for line in lines)
    return " ".join(d["text"] for d in documents[:C4_DOCUMENTS])


def stream_perplexity(
    name: str,
    model: nn.Module,
    tokenizer: Any,
    text: str,
    *,
    window: int,
    limit: int | None = None,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> StreamScore:
    """Perplexity per token of one model on one text.

    Args:
        name: of the model, for messages.
        model, tokenizer: a transformers causal language model in evaluation mode.
        text: see `stream_text`.
        window: token ids per window.
        limit: at most so many windows.
        batch_size: windows at a time; None keeps logits near 32 MB.
        progress: called with (done, total) windows.

    Raises:
        RecipeError: the window is longer than the model's context.
        DataError: the text has no full window.
        NumericalError: NaN or infinite logits; names the first window.
    """
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if window < 2 or (longest is not None and window > longest):
        raise RecipeError(f"{name} reads 2 to {longest} tokens but the window is {window}")
    ids = _stream(tokenizer, text)
    count = min(len(ids) // window, limit or len(ids))
    if count < 1:
        raise DataError(f"the text has {len(ids)} tokens, not one window of {window}; give more")
    rows = ids[: count * window].view(count, window)
    size = batch_size or max(
        1, BATCH_ENTRIES // (window * model.config.get_text_config().vocab_size)
    )
    nats = torch.empty(count, dtype=torch.float64)
    for start in range(0, count, size):
        batch = rows[start : start + size]
        nats[start : start + len(batch)] = _losses(model, batch)
        if progress is not None:
            progress(start + len(batch), count)
    bad = (~nats.isfinite()).nonzero()
    if len(bad):
        raise NumericalError(f"{name}: logits are NaN or infinite, first in window {int(bad[0])}")
    value = perplexity_of(nats.mean().item(), name)
    stderr = value * (nats.std() / math.sqrt(count)).item() if count > 1 else None
    return StreamScore(value, stderr, window, count * (window - 1), nats.tolist())


def perplexity_of(nats: float, name: str) -> float:
    """exp(nats). Raises NumericalError where no float holds it: the model is broken."""
    try:
        return math.exp(nats)
    except OverflowError as error:
        raise NumericalError(f"{name}: {nats:.0f} nats per token; the model is broken") from error


def _stream(tokenizer: Any, text: str) -> Tensor:
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    head = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return torch.tensor(head + list(ids), dtype=torch.int64)


def _losses(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean nats of each window (rows of ids)."""
    ids = ids.to(next(model.parameters()).device)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    # -log softmax(logits)[token]; the library's cross-entropy wants the vocabulary in the middle,
    # where its sums are four times as slow.
    wanted = logits.gather(-1, ids[:, 1:, None])[..., 0]
    return (logits.logsumexp(-1) - wanted).double().mean(1).cpu()
