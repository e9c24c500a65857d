"""What training minimises: KL from the original's predictions, or error of activations.

The divergence is over the whole vocabulary, mean over tokens, in nats:

    KL = 1/T sum_t sum_v p_tv (log p_tv - log q_tv),      d KL / d logits_q = (q - p) / T

Its gradient is made in the forward pass, a slice of tokens at a time, in one buffer the size of
the logits: a graph of log-softmax, exp and products would keep five of them.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

# Entries of a slice: a few float32 arrays of this size stay in the cache of a core.
SLICE_ENTRIES = {"cpu": 2**18}
DEVICE_SLICE_ENTRIES = 2**24


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, logits: Tensor, original: Tensor) -> Tensor:
        wanted = context.needs_input_grad[0]
        vocabulary = logits.shape[-1]
        rows = logits.reshape(-1, vocabulary)
        gradient = torch.empty_like(rows) if wanted else None
        size = SLICE_ENTRIES.get(logits.device.type, DEVICE_SLICE_ENTRIES)
        step = max(1, size // vocabulary)
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        targets = original.reshape(-1, vocabulary)
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            log_p = targets[part].to(logits.device).float().log_softmax(-1)
            log_q = rows[part].float().log_softmax(-1)
            p = log_p.exp()
            # a token that the original rules out adds nothing, whatever q says of it
            total += torch.linalg.vecdot(p, (log_p - log_q).masked_fill(p == 0, 0.0)).double().sum()
            if gradient is not None:
                gradient[part] = (log_q.exp() - p) / len(rows)
        context.gradient = None if gradient is None else gradient.reshape(logits.shape)
        return (total / len(rows)).float()

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return context.gradient * gradients[0], None


def divergence(logits: Tensor, original: Tensor) -> Tensor:
    """Mean KL(original || this) in nats over all tokens of logits (..., V); differentiable."""
    return _Divergence.apply(logits, original)


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """||output - target||^2 / ||target||^2 in float32; differentiable in `output`."""
    energy = target.float().square().sum().clamp(min=torch.finfo(torch.float32).tiny)
    return (output.float() - target.float()).square().sum() / energy


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean -log q(token) of every token but the first of each window."""
    predictions = logits[:, :-1].reshape(-1, logits.shape[-1]).float()
    return torch.nn.functional.cross_entropy(predictions, tokens[:, 1:].reshape(-1))


def mixed_precision(device: torch.device) -> AbstractContextManager[object]:
    """bfloat16 products in training where they are fast; whatever is only measured is float32.

    A validation loss of 0.002 nats would drown in logits of 8 bits.
    """
    if not torch.is_grad_enabled() or not fast_bfloat16(device):
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def fast_bfloat16(device: torch.device) -> bool:
    """Whether products in bfloat16 are faster: on accelerators, and CPUs with tile registers."""
    if device.type != "cpu":
        return True
    return bool(getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16", False))
