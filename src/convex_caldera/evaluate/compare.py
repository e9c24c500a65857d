"""Models beside the original on the same tokens, in the same run.

A perplexity alone says little: it moves with the text, the window and the BOS rule. So the
first model of every evaluation is the original, all models read the same batches at the same
time, and the figures that judge a compression are its divergence from the original on each
token. Logits live for one batch only.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from convex_caldera.errors import NumericalError, RecipeError, ShapeError
from convex_caldera.evaluate.divergence import TokenScores, token_scores
from convex_caldera.evaluate.standard_error import clustered_mean
from convex_caldera.evaluate.windows import Batch, Protocol, Windows, token_windows

# Logits of one batch and model, in entries; decides how many windows run at once.
BATCH_ENTRIES = 2**23

# Called with (windows done, windows in all, seconds left) after each batch.
ProgressCallback = Callable[[int, int, float], None]


@dataclass(frozen=True)
class Candidate:
    """A model to evaluate: its name, how to load it, and what it weighs on disk.

    `load` returns a transformers causal language model (anything that answers
    model(input_ids=ids, use_cache=False).logits) and is called once. The sizes are reported
    as given; None where they mean nothing, as for a model that is only in memory.
    """

    name: str
    load: Callable[[], nn.Module]
    file_bytes: int | None = None
    bits_per_compressed_weight: float | None = None


@dataclass(frozen=True)
class ModelScore:
    """One line of an evaluation; a stderr is None if there was one window only.

    `nats_per_token` is the mean negative log-likelihood, `perplexity` its exponential,
    `bits_per_byte` the same per UTF-8 byte of text. `kl` is the mean of KL(original || this)
    per token in nats, `top1_agreement` the share of tokens where both rank the same first.
    """

    name: str
    file_bytes: int | None
    bits_per_compressed_weight: float | None
    perplexity: float
    perplexity_stderr: float | None
    bits_per_byte: float | None
    kl: float
    kl_stderr: float | None
    top1_agreement: float
    top1_stderr: float | None
    tokens: int
    nats_per_token: float


@dataclass(frozen=True)
class Evaluation(Sequence[ModelScore]):
    """The scores, original first, and the protocol they hold under; a sequence of scores."""

    models: tuple[ModelScore, ...]
    protocol: Protocol
    seconds: float

    def __len__(self) -> int:
        return len(self.models)

    def __getitem__(self, index: Any) -> Any:
        return self.models[index]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: models, protocol, seconds."""
        return {**asdict(self), "models": [asdict(score) for score in self.models]}


def evaluate(
    candidates: Sequence[Candidate],
    text: str,
    tokenizer: Any,
    *,
    window: int = 512,
    stride: int | None = None,
    bos: bool = True,
    max_tokens: int | None = None,
    batch_size: int | None = None,
    progress: ProgressCallback | None = None,
) -> Evaluation:
    """Perplexity of each model, and divergence of each from the first, on one text.

    Args:
        candidates: the original first, then what was made of it; one vocabulary.
        text: held-out text, never the one calibrated on.
        tokenizer: the original's.
        window, stride, bos, max_tokens: the protocol, see `token_windows`.
        batch_size: windows at a time; by default as many as keep logits near 32 MB.
        progress: called after each batch with (done, total, seconds left).

    Raises:
        RecipeError: no candidate, names repeat, or the window exceeds a model's context.
        DataError: the text is too short.
        ShapeError: vocabularies differ.
        NumericalError: a model gives NaN or infinite figures; names it and the first window.

    Cost: one forward pass of every model over the text. All models are in memory together;
    with little memory, evaluate (original, one candidate) at a time: the figures are equal.
    """
    _check_names(candidates)
    windows = token_windows(text, tokenizer, window, stride, bos=bos, max_tokens=max_tokens)
    started = time.monotonic()
    models = [candidate.load() for candidate in candidates]
    for candidate, model in zip(candidates, models, strict=True):
        _check_context(candidate.name, model, window)
    size = batch_size or max(1, BATCH_ENTRIES // (window * _vocabulary_size(models[0], tokenizer)))
    names = [candidate.name for candidate in candidates]
    with _inference(models):
        sums = _window_sums(names, models, windows, size, progress)
    scores = tuple(_score(c, s, windows) for c, s in zip(candidates, sums, strict=True))
    return Evaluation(scores, windows.protocol, time.monotonic() - started)


def _window_sums(
    names: list[str],
    models: list[nn.Module],
    windows: Windows,
    batch_size: int,
    progress: ProgressCallback | None,
) -> Tensor:
    """Sums of nats, KL and agreement over each window: (models, 3, windows), float64."""
    total, done, started = len(windows.spans), 0, time.monotonic()
    sums = torch.zeros(len(models), 3, total, dtype=torch.float64)
    for batch in windows.batches(batch_size):
        original = None
        for index, (name, model) in enumerate(zip(names, models, strict=True)):
            logits = batch.predictions(_logits(model, batch.ids))
            if original is not None and logits.shape != original.shape:
                raise ShapeError(
                    f"{name} predicts {logits.shape[-1]} tokens but {names[0]} "
                    f"{original.shape[-1]}; compare models of one vocabulary"
                )
            scores = token_scores(logits, batch.targets, original)
            _check_finite(name, scores, batch, windows)
            for row, figure in enumerate((scores.nats, scores.kl, scores.agreement)):
                sums[index, row, batch.windows.start : batch.windows.stop] = figure.sum(1)
            original = logits if original is None else original
        done += len(batch.windows)
        if progress is not None:
            progress(done, total, (time.monotonic() - started) / done * (total - done))
    return sums


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    device = next(model.parameters()).device
    return model(input_ids=ids.to(device), use_cache=False).logits


def _score(candidate: Candidate, sums: Tensor, windows: Windows) -> ModelScore:
    counts = torch.tensor([span.end - span.first for span in windows.spans])
    nats, kl, agreement = (clustered_mean(figure, counts) for figure in sums)
    perplexity = math.exp(nats.mean)
    scored_bytes = windows.protocol.scored_bytes
    return ModelScore(
        name=candidate.name,
        file_bytes=candidate.file_bytes,
        bits_per_compressed_weight=candidate.bits_per_compressed_weight,
        perplexity=perplexity,
        # d exp(m) = exp(m) dm
        perplexity_stderr=None if nats.stderr is None else perplexity * nats.stderr,
        bits_per_byte=sums[0].sum().item() / math.log(2) / scored_bytes if scored_bytes else None,
        kl=kl.mean,
        kl_stderr=kl.stderr,
        top1_agreement=agreement.mean,
        top1_stderr=agreement.stderr,
        tokens=windows.protocol.tokens,
        nats_per_token=nats.mean,
    )


@contextmanager
def _inference(models: list[nn.Module]) -> Iterator[None]:
    """Evaluation mode without gradients; each module's own mode is given back."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _vocabulary_size(model: nn.Module, tokenizer: Any) -> int:
    config = getattr(model, "config", None)
    return getattr(config, "vocab_size", None) or len(tokenizer)


def _check_names(candidates: Sequence[Candidate]) -> None:
    names = [candidate.name for candidate in candidates]
    if not names or len(set(names)) < len(names):
        raise RecipeError(f"evaluation needs models with different names, got {names}")


def _check_context(name: str, model: nn.Module, window: int) -> None:
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if longest is not None and window > longest:
        raise RecipeError(
            f"{name} reads at most {longest} tokens but the window is {window}; "
            f"choose --window {longest} or less"
        )


def _check_finite(name: str, scores: TokenScores, batch: Batch, windows: Windows) -> None:
    bad = ~(scores.nats.isfinite() & scores.kl.isfinite())
    if not bad.any():
        return
    row, column = (int(i) for i in bad.nonzero()[0])
    window = batch.windows[row]
    token = windows.spans[window].first + column
    raise NumericalError(
        f"{name}: logits are NaN or infinite, first in window {window} of "
        f"{len(windows.spans)} at token {token} of the text "
        f"(nats {scores.nats[row, column].item()}, KL {scores.kl[row, column].item()}); "
        "inspect the model's weights, or evaluate it in float32"
    )
