"""Whether a tensor is free of NaN and infinities."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def all_finite(x: Tensor) -> bool:
    """True if no entry is NaN or infinite: one pass, where `isfinite(x).all()` takes several.

    A NaN anywhere makes both extremes NaN.
    """
    if not x.numel():
        return True
    least, most = torch.aminmax(x.detach())
    return math.isfinite(float(least)) and math.isfinite(float(most))
