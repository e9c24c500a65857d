"""What a rank is worth: the energy that it takes out of a matrix, before anything is fitted.

After a Hadamard transform and with feedback, rounding at b bits loses D(b) e / (m n) times a
constant of the layer's metric, e the energy of what is rounded. With a rank-r term whose factors
are each rounded with relative noise d, singular values split evenly between them and components
mixed to equal energy (fit.coded_factors), that energy is

    e_r = sum_{i > r} s_i^2 + 2 d (sum_{i <= r} s_i)^2 / r,      s_i the singular values of W,

because what the factors miss is rounded with the rest. So u_r = log(e_r / e_0) is the rank curve
of the joint program (convex_program.md, section 7; allocate.surrogate), and the rank that serves
best at any total rate is where u_r + k rho_r is least, rho_r the factors' bits per weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from convex_caldera.allocate.menu import Floats

# Noise far below any coding; keeps the logarithm finite where a rank takes everything.
LEAST_ENERGY = 1e-9


def factor_noise(factor_bits: int) -> float:
    """d: relative noise of one factor coded with that many bits an entry (6.02 dB a bit)."""
    return 4.0**-factor_bits


def spectrum(W: Tensor) -> Floats:
    """Squared singular values of W (m, n), falling, float64.

    Cost: a Gram matrix of the shorter side and its eigenvalues.
    """
    A = W.double() if W.shape[0] <= W.shape[1] else W.double().T
    return np.clip(torch.linalg.eigvalsh(A @ A.T).flip(0).cpu().numpy(), 0.0, None)


def log_energies(squares: Floats, ranks: Sequence[int], noise: float) -> list[float]:
    """u_r for every rank; 0.0 at rank 0, and everywhere for a matrix of zeros."""
    total = float(squares.sum())
    if total <= 0:
        return [0.0] * len(ranks)
    left = 1.0 - np.concatenate([[0.0], np.cumsum(squares)]) / total
    sums = np.concatenate([[0.0], np.cumsum(np.sqrt(squares))])
    coding = 2.0 * noise * sums**2 / (np.maximum(np.arange(len(sums)), 1) * total)
    return [math.log(max(float(left[r] + coding[r]), LEAST_ENERGY)) for r in ranks]
