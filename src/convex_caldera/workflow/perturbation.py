"""What other values of one parameter cost in nats, measured by running the model with them.

    KL(model || model with W^),    nats per token of calibration text

For matrices whose loss no expansion stands for: an embedding is read row by row, may be used
twice, and has as many rows as there are tokens, far too many for an output curvature.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from convex_caldera.evaluate.divergence import token_scores
from convex_caldera.workflow.substituted import Substituted, always

# Tokens that every value is measured on; all on the same ones.
MEASURED_TOKENS = 8192
BATCH = 4


@torch.no_grad()
def measured_kl(
    model: Any, tokens: Tensor, parameter: str, values: Sequence[Tensor]
) -> list[float]:
    """Nats per token of each of several values of one parameter, in all places that share it.

    Args:
        model: the original.
        tokens: (windows, length); the first `MEASURED_TOKENS` of them are used.
        parameter: its name in the model.
        values: what to put in its place, each of its shape.

    Cost: one forward pass a value, and one of the original.
    """
    windows = tokens[: max(1, MEASURED_TOKENS // tokens.shape[1])]
    others = [Substituted(model, {parameter: always(value)}) for value in values]
    sums = [0.0] * len(values)
    for ids in windows.to(next(model.parameters()).device).split(BATCH):
        original = model(input_ids=ids, use_cache=False).logits
        for i, other in enumerate(others):
            logits = other(input_ids=ids, use_cache=False).logits
            sums[i] += float(token_scores(logits, ids, original).kl.sum())
    return [max(total / windows.numel(), 0.0) for total in sums]
