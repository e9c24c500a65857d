"""What one model says about tokens, and how far a second model is from it.

For a token t after a context, with p the original's and q the compressed model's distribution:

    nats       -log q(t), whose mean is the log of the perplexity
    kl         KL(p || q) = sum_v p(v) (log p(v) - log q(v)) over the whole vocabulary
    agreement  1 if both find the same token most probable

KL and agreement compare distributions, not luck with the next token, so their noise is far
below that of a difference of perplexities (the table of llama.cpp made them customary).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Entries of one float32 slice of logits; 16 MB, a few of which are alive at once.
SLICE_ENTRIES = 2**22


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
    slices = max(1, SLICE_ENTRIES // vocabulary)
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
    log_p = original.float().log_softmax(-1)
    # A token that the original rules out, p = 0, adds nothing whatever q says of it.
    gap = (log_p - log_q).masked_fill_(log_p == -torch.inf, 0.0)
    kl = (log_p.exp_() * gap).sum(-1).double().cpu()
    agreement = (logits.argmax(-1) == original.argmax(-1)).double().cpu()
    return _nats(log_q, targets), kl, agreement
