"""What one model says about tokens, and how far a second model is from it.

For a token t after a context, with p the original's and q the compressed model's distribution:

    nats       -log q(t), whose mean is the log of the perplexity
    kl         KL(p || q) = sum_v p(v) (log p(v) - log q(v)) over the whole vocabulary
    agreement  1 if the original's most probable token is also q's

KL and agreement compare distributions, not luck with the next token, so their noise is far
below that of a difference of perplexities (the table of llama.cpp made them customary).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Entries of one float32 slice of logits, a few of which are alive at once: on a CPU they should
# stay in its cache (1 MB), on an accelerator a launch should have enough to do (64 MB).
CPU_SLICE = 2**18
DEVICE_SLICE = 2**24


@dataclass(frozen=True)
class TokenScores:
    """Per-token figures, float64, all of the shape of the targets."""

    nats: Tensor
    kl: Tensor
    agreement: Tensor


def token_scores(logits: Tensor, targets: Tensor, original: Tensor | None = None) -> TokenScores:
    """Score logits (..., V) on targets (...), against the original's logits where given.

    Without `original` the model is the original: its divergence from itself is zero. Works
    through slices of the rows in float32, so that memory stays flat for any vocabulary. NaN
    or infinite logits come out as NaN or infinite figures, for the caller to report.
    """
    vocabulary = logits.shape[-1]
    entries = CPU_SLICE if logits.device.type == "cpu" else DEVICE_SLICE
    slices = max(1, entries // vocabulary)
    rows = logits.reshape(-1, vocabulary).split(slices)
    wanted = targets.reshape(-1).to(logits.device).split(slices)
    if original is None:
        parts = [(_nats(q.float().log_softmax(-1), t),) for q, t in zip(rows, wanted, strict=True)]
        nats = torch.cat([part[0] for part in parts]).reshape(targets.shape)
        return TokenScores(nats, torch.zeros_like(nats), torch.ones_like(nats))
    reference = original.reshape(-1, vocabulary).split(slices)
    triples = [_compare(q, t, p) for q, t, p in zip(rows, wanted, reference, strict=True)]
    columns = zip(*triples, strict=True)
    nats, kl, agreement = (torch.cat(part).reshape(targets.shape) for part in columns)
    return TokenScores(nats, kl, agreement)


def _nats(log_q: Tensor, targets: Tensor) -> Tensor:
    return -log_q.gather(-1, targets[:, None])[:, 0].double().cpu()


def _compare(logits: Tensor, targets: Tensor, original: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    original = original.to(logits.device)
    log_q = logits.float().log_softmax(-1)
    kl = _divergence(original.float().log_softmax(-1), log_q).double().cpu()
    first = original.argmax(-1, keepdim=True)
    agreement = logits.gather(-1, first) == logits.amax(-1, keepdim=True)
    return _nats(log_q, targets), kl, agreement[:, 0].double().cpu()


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    p, gap = log_p.exp(), log_p - log_q
    kl = torch.linalg.vecdot(p, gap)
    if kl.isnan().any():
        # A token that the original rules out, p = 0, adds nothing whatever q says of it, but
        # 0 * inf is NaN. (NaN logits make p NaN, not 0, and stay.)
        kl = torch.linalg.vecdot(p, gap.masked_fill(p == 0, 0.0))
    return kl
