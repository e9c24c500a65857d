"""Attention with both operands of both products rounded, and how a model is given it.

    q(softmax(q(Q) q(K)^T s)) q(V),   through transformers' table of attention functions

In layout "contraction" values share scales along tokens, so the last block of a causal sequence
sees a few tokens of its future; in "legacy" keys do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from convex_caldera.core.protocols import Quantizer
from convex_caldera.errors import ModelError
from convex_caldera.recipes.activations import Activations
from convex_caldera.runtime.activations import rounded
from convex_caldera.runtime.linear import CompressedLinear

# What some models add to their scores, which this attention does not know.
_REFUSED = ("s_aux", "position_bias", "head_mask")


def round_activations(model: Any, activations: Activations) -> None:
    """Make a loaded model round its activations, in place.

    Args:
        model: of transformers, with `CompressedLinear` modules.
        activations: what is rounded, to what.

    Raises:
        ModelError: attention is to be rounded but the model's does not go through transformers'
            table of attention functions.
    """
    for module in model.modules():
        if isinstance(module, CompressedLinear):
            module.activation = activations.linear
    if activations.attention is not None:
        _replace_attention(model, Attention(activations.attention, activations.layout))


class Attention:
    """Eager attention of transformers with both operands of both products rounded."""

    def __init__(self, quantizer: Quantizer, layout: str):
        self.quantizer = quantizer
        self.layout = layout

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        softcap: float | None = None,
        **others: Any,
    ) -> tuple[Tensor, Tensor]:
        """(batch, heads, tokens, d) each; returns (batch, tokens, heads, d) and probabilities."""
        given = [name for name in _REFUSED if others.get(name) is not None]
        if given:
            raise ModelError(
                f"{type(module).__name__} attends with {given[0]}, which rounded attention does "
                "not know; compress with --activations FORMAT,attention:none"
            )
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        heads = query.shape[1] // key.shape[1]
        along_tokens = self.layout == "legacy"
        key = self._round(key, along_tokens).repeat_interleave(heads, 1)
        value = self._round(value, not along_tokens).repeat_interleave(heads, 1)
        scores = self._round(query, False) @ key.transpose(2, 3) * scaling
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        if attention_mask is not None:
            scores = scores + attention_mask
        shares = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
        shares = nn.functional.dropout(shares, dropout, training=module.training)
        output = self._round(shares, False) @ value
        return output.transpose(1, 2).contiguous(), shares

    def _round(self, x: Tensor, along_tokens: bool) -> Tensor:
        if along_tokens:
            return rounded(x.transpose(2, 3), self.quantizer).transpose(2, 3)
        return rounded(x, self.quantizer)


def _replace_attention(model: Any, attention: Attention) -> None:
    """Register the attention under a name that says what it does, and choose it."""
    from transformers.masking_utils import AttentionMaskInterface, eager_mask
    from transformers.modeling_utils import AttentionInterface

    if not model._can_set_attn_implementation():
        raise ModelError(
            f"the attention of {type(model).__name__} cannot be replaced; compress with "
            "--activations FORMAT,attention:none"
        )
    # a slash would be taken for the name of a kernel on the hub
    shown = Activations(None, attention.quantizer, attention.layout).name  # type: ignore[arg-type]
    name = "convex_caldera_" + "".join(c if c.isalnum() else "_" for c in shown)
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, eager_mask)
    model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        raise ModelError(f"{type(model).__name__} did not accept the rounded attention")
