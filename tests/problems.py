"""Small problems with known structure, shared by many tests."""

import functools

import numpy as np
import torch

from convex_caldera.core.hessian import Hessian


def correlated_hessian(n, seed=0, damping=0.01, spread=1.5):
    """A full-rank H with decaying spectrum and uneven channels, float64."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
    spectrum = torch.logspace(0, -spread, n, dtype=torch.float64)
    channels = torch.exp(0.5 * torch.randn(n, generator=generator, dtype=torch.float64))
    root = channels[:, None] * basis * spectrum.sqrt()
    return Hessian(root @ root.T, damping, "toy")


def gaussian(m, n, seed=0, dtype=torch.float64):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@functools.cache
def acceptance_case():
    """The synthetic CALDERA case of the literature notes: W (256, 256), H with ridge 0.01.

    H = U diag(1 / (1 + i)) U^T over its mean diagonal, plus 0.01 I; W = G + 0.7 low, rms one,
    with `low` of rank 12. Draws in this order from numpy's default_rng(0).
    """
    rng, n = np.random.default_rng(0), 256
    U = np.linalg.qr(rng.standard_normal((n, n)))[0]
    H = U @ np.diag(1 / (1 + np.arange(n))) @ U.T
    H = H / np.mean(np.diag(H)) + 0.01 * np.eye(n)
    G = rng.standard_normal((n, n))
    low = rng.standard_normal((n, 12)) @ rng.standard_normal((12, n)) * 0.65 / np.sqrt(12)
    W = G + 0.7 * low
    W = W / np.sqrt(np.mean(W**2))
    return torch.from_numpy(W), Hessian(torch.from_numpy(H), damping=0.0, name="acceptance")
