"""Rounding activations to a number format in the forward pass.

    linear      y = Q q(x) + L q(R q(x)),  blocks along the axis that the product sums over
    attention   `runtime.attention`

All is emulated: values are rounded to what the format can hold, and products are then those of
the working precision. Gradients pass straight through.
"""

from __future__ import annotations

from torch import Tensor

from convex_caldera.core.protocols import Quantizer
from convex_caldera.quantizers.mxint import MXInt, round_blocks


def rounded(x: Tensor, quantizer: Quantizer) -> Tensor:
    """x (..., n) as the format holds it, blocks along the last axis, in the dtype of x."""
    values = _round(x.detach(), quantizer).to(x.dtype)
    return x + (values - x).detach() if x.requires_grad else values


def _round(x: Tensor, quantizer: Quantizer) -> Tensor:
    if isinstance(quantizer, MXInt):
        return round_blocks(x, quantizer)
    rows = x.reshape(-1, x.shape[-1]).float()
    fitted = quantizer.fit(rows)
    return fitted.decode(fitted.encode(rows)).view(x.shape)
