"""Perplexity, KL and agreement in one plain loop over single tokens' rows; slow and literal."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def evaluate_literally(original, model, ids, window, stride, bos_id):
    """(nats per token, KL, agreement, number of tokens) of windows cut as the protocol says."""
    head = [] if bos_id is None else [bos_id]
    step = min(stride, window - len(head))
    nats, kl, same, seen = [], [], [], set()
    for begin in range(0, len(ids), step):
        body = ids[begin : begin + window - len(head)]
        tokens = torch.tensor([head + body])
        with torch.no_grad():
            P, Q = original(tokens).logits[0].double(), model(tokens).logits[0].double()
        for place in range(1, tokens.shape[1]):
            where = begin + place - len(head)
            if where in seen:
                continue
            seen.add(where)
            nats.append(F.cross_entropy(Q[place - 1], tokens[0, place]).item())
            p, q = P[place - 1].softmax(0), Q[place - 1].softmax(0)
            kl.append(sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True)))
            same.append(float(P[place - 1].argmax() == Q[place - 1].argmax()))
        # A window's first token without BOS stays unscored, also in later windows.
        seen.update(range(begin, begin + len(body)))
        if begin + len(body) == len(ids):
            break
    count = len(nats)
    return sum(nats) / count, sum(kl) / count, sum(same) / count, count
