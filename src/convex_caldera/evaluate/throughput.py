"""How fast a model reads and writes: prefill, decode, memory, and the share of the roofline.

Prefill is one forward over `batch` prompts; decode is one token at a time for each of them, with
the cache of keys and values. Both are medians over repeats after a warm-up. Decoding a small batch
reads every weight once a step and computes little, so it cannot be faster than

    seconds per step >= bytes of the weights / memory bandwidth,

the bandwidth roofline. `roofline_share` is that bound over the time measured, with the bytes that
the weights have in memory (packed codes as packed) and a bandwidth measured here, on one large
read. Papers often give another figure: one token without context replayed, which is no decoding.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from convex_caldera.errors import NumericalError, RecipeError

# Larger than any cache: 256 MB read per trial.
BANDWIDTH_BYTES, BANDWIDTH_TRIALS = 2**28, 5


@dataclass(frozen=True)
class Throughput:
    """One batch size of one model. Seconds are per prefill of the batch and per decoded step."""

    batch: int
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    prefill_tokens_per_second: float
    decode_seconds: float
    decode_tokens_per_second: float
    roofline_share: float
    peak_memory_bytes: int | None


def measure_throughput(
    name: str,
    model: nn.Module,
    batch: int,
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    repeats: int = 3,
    bandwidth: float,
) -> Throughput:
    """Time one batch size on random prompts.

    Args:
        name: of the model, for messages.
        model: a transformers causal language model in evaluation mode.
        batch: prompts at a time.
        prompt_tokens, new_tokens: of each prompt.
        repeats: of the whole; medians are reported.
        bandwidth: bytes per second, of `memory_bandwidth`.

    Raises:
        RecipeError: a size is below 1, or prompt and answer exceed the model's context.
        NumericalError: NaN logits.
    """
    _check(name, model, batch, prompt_tokens, new_tokens, repeats)
    device = next(model.parameters()).device
    vocabulary = model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
    source = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (batch, prompt_tokens), generator=source).to(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    _once(name, model, ids[:, :1], 1)  # warm-up: kernels compile
    runs = [_once(name, model, ids, new_tokens) for _ in range(repeats)]
    prefill = statistics.median(run[0] for run in runs)
    step = statistics.median(run[1] for run in runs) / new_tokens
    cuda = device.type == "cuda"
    return Throughput(
        batch=batch,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        prefill_seconds=prefill,
        prefill_tokens_per_second=batch * prompt_tokens / prefill,
        decode_seconds=step,
        decode_tokens_per_second=batch / step,
        roofline_share=weight_bytes(model) / bandwidth / step,
        peak_memory_bytes=torch.cuda.max_memory_allocated(device) if cuda else None,
    )


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers in memory, tied ones once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


def memory_bandwidth(device: torch.device | str = "cpu") -> float:
    """Bytes per second of reading one large tensor, the best of a few trials."""
    values = torch.ones(BANDWIDTH_BYTES // 4, device=device)
    best = min(_timed(values.sum, values.device) for _ in range(BANDWIDTH_TRIALS))
    return BANDWIDTH_BYTES / best


def _once(name: str, model: nn.Module, ids: Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds of the prefill, and of all steps together."""
    outputs: list[Any] = []

    def prefill() -> None:
        outputs.append(model(input_ids=ids, use_cache=True))

    def decode() -> None:
        output = outputs.pop()
        for _ in range(new_tokens):
            step = output.logits[:, -1:].argmax(-1)
            output = model(input_ids=step, past_key_values=output.past_key_values, use_cache=True)
        outputs.append(output)

    with torch.inference_mode():
        seconds = _timed(prefill, ids.device), _timed(decode, ids.device)
    if outputs[0].logits.isnan().any():
        raise NumericalError(f"{name}: logits are NaN; inspect the model's weights")
    return seconds


def _timed(work: Callable[[], Any], device: torch.device) -> float:
    _wait(device)
    started = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _check(
    name: str, model: nn.Module, batch: int, prompt: int, new_tokens: int, repeats: int
) -> None:
    if min(batch, prompt, new_tokens, repeats) < 1:
        raise RecipeError(
            f"throughput needs batch, prompt, new tokens and repeats >= 1, got {batch}, {prompt}, "
            f"{new_tokens}, {repeats}"
        )
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and prompt + new_tokens > longest:
        raise RecipeError(
            f"{name} reads at most {longest} tokens but prompt and answer have "
            f"{prompt + new_tokens}; shorten --prompt-tokens or --new-tokens"
        )
