"""What a quantizer does to the Gaussian source: distortion and rate, for tables and choices."""

from __future__ import annotations

import torch

from convex_caldera.core.protocols import Quantizer
from convex_caldera.core.seeds import generator


def gaussian_distortion(
    quantizer: Quantizer, size: tuple[int, int] = (1024, 1024), seed: int = 0
) -> tuple[float, float]:
    """(mean squared error, stored bits per weight) on an N(0, 1) matrix of this size.

    Stored bits count packed codes and every side tensor. No b-bit code has an error below
    2^(-2 b), Shannon's bound; four scalar levels of one scale stay above .1175, E8P at 2 bits
    has .0914.
    """
    W = torch.randn(size, generator=generator(seed, "gaussian", "distortion"))
    fitted = quantizer.fit(W)
    codes = fitted.encode(W)
    error = (fitted.decode(codes) - W).double().square().mean().item()
    side = sum(t.numel() * t.element_size() for t in fitted.tensors().values())
    return error, 8 * (fitted.pack(codes).numel() + side) / W.numel()
