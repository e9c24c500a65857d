"""A-priori bounds on what double precision does to products, sums and definiteness.

With u = 2^-53 and gamma(n) = n u / (1 - n u), for any order of summation

    ||fl(A B) - A B||_F <= gamma(k) ||A||_F ||B||_F          (k the inner dimension)
    |fl(<A, B>) - <A, B>| <= gamma(size) ||A||_F ||B||_F,

and if a floating-point Cholesky factorisation of A - c I succeeds, with c of at least
gamma(n + 2) tr(A) / (1 - gamma(n + 2)) and the rounding of the diagonal, then A is positive
semidefinite: no power iteration is trusted, whose error is on the wrong side.

Sources: Higham, Accuracy and Stability of Numerical Algorithms, ch. 3; Rump, Verification of
positive definiteness, BIT 46 (2006). Underflow is below anything that is compared here.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from convex_caldera.errors import CheckError

Floats = NDArray[np.float64]
UNIT = 2.0**-53
ATTEMPTS = 40  # doublings of the margin of a spectral norm before giving up


def gamma(count: int) -> float:
    """n u / (1 - n u), rounded up."""
    share = (count + 2) * UNIT
    if share >= 0.5:
        raise CheckError(f"{count} operations are too many for a rounding bound")
    return share / (1 - share) * (1 + 4 * UNIT)


def norm_above(A: Floats) -> float:
    """A number >= ||A||_F."""
    return float(np.linalg.norm(A)) * (1 + gamma(A.size + 8))


def product_error(A: Floats, B: Floats) -> float:
    """A number >= ||fl(A B) - A B||_F."""
    return gamma(A.shape[1] + 4) * norm_above(A) * norm_above(B) * (1 + 8 * UNIT)


def inner_product(A: Floats, B: Floats) -> tuple[float, float]:
    """<A, B> as computed, and a bound of its error."""
    return float(np.vdot(A, B)), gamma(A.size + 4) * norm_above(A) * norm_above(B)


def is_semidefinite(A: Floats, slack: float = 0.0) -> bool:
    """True only if the symmetric A - slack I is positive semidefinite, whatever rounding did."""
    n = len(A)
    trace = float(np.abs(np.diag(A)).sum()) * (1 + gamma(n))
    margin = 2 * gamma(n + 4) * trace + slack
    shifted = A - np.diag(np.full(n, margin + 4 * UNIT * (margin + trace)))
    try:
        np.linalg.cholesky(shifted)
    except np.linalg.LinAlgError:
        return False
    return True


def spectral_norm_above(Y: Floats) -> float:
    """A number >= ||Y||_2 and close to it: t^2 I - Y Y^T proved semidefinite."""
    if not Y.any():
        return 0.0
    A = Y if Y.shape[0] <= Y.shape[1] else Y.T
    G = A @ A.T
    G = 0.5 * (G + G.T)
    wrong = 2 * gamma(A.shape[1] + 6) * norm_above(A) ** 2
    top = float(np.linalg.eigvalsh(G)[-1])
    margin = wrong + 8 * gamma(len(G) + 8) * len(G) * top
    for _ in range(ATTEMPTS):
        square = top + margin
        if is_semidefinite(square * np.eye(len(G)) - G, wrong + 8 * UNIT * square):
            return math.sqrt(square) * (1 + 4 * UNIT)
        margin *= 2
    raise CheckError("no upper bound of a spectral norm could be verified")
