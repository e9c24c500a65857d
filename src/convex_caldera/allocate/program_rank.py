"""The nuclear-norm weights at which the convex program's solution has given ranks.

Users think in ranks, the program in mu. The rank of Z_g falls with mu_g, so each mu_g is bisected
on a logarithmic scale, all groups at once: one solution of the program halves every bracket.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from convex_caldera.allocate.program import solve_program
from convex_caldera.allocate.program_input import eigenbases
from convex_caldera.core.hessian import Hessian
from convex_caldera.errors import RecipeError
from convex_caldera.linalg.dual_norm import spectral_norm_bound

MU_RANGE = 1e-6  # mu is sought between this share of the value at which Z = 0 and that value
PRECISION = 1.01  # ratio of the bracket's ends at which the search stops
RANK_TOLERANCE = 1e-4  # relative gap at which ranks are read off


def mu_for_ranks(
    W: Sequence[Tensor],
    H: Sequence[Tensor | Hessian | None],
    ranks: Sequence[int],
    **constants: Any,
) -> tuple[float, ...]:
    """The least mu_g, to a percent, at which the penalty form keeps each rank within `ranks`.

    Args:
        W, H: as in `solve_program`.
        ranks: the most that Z_g may have.
        constants: lam, kappa, c, k, p, b_min, b_max and budget of `solve_program`.

    Raises:
        RecipeError: a rank out of range; else as `solve_program`.

    Cost: about eleven solutions at a relative gap of 1e-4.
    """
    bases = eigenbases(W, H)
    if len(ranks) != len(W):
        raise RecipeError(f"{len(W)} groups need as many ranks, got {list(ranks)}")
    for g, (rank, weight) in enumerate(zip(ranks, W, strict=True)):
        if not 0 <= rank <= min(weight.shape):
            raise RecipeError(f"rank {rank} of group {g} is out of range for {tuple(weight.shape)}")
    # At Z = 0 the dual matrix is W H_s with H_s <= H in one basis, hence no larger than W H.
    high = np.array([spectral_norm_bound(basis.W * basis.h) for basis in bases])
    low = MU_RANGE * high
    wanted = np.array(ranks)
    low = np.where(wanted == 0, high, low)
    while bool(np.any(high > PRECISION * low)):
        middle = np.sqrt(low * high)
        found = solve_program(W, H, mu=middle.tolist(), tol=RANK_TOLERANCE, **constants)
        fits = np.array(found.ranks) <= wanted
        high, low = np.where(fits, middle, high), np.where(fits, low, middle)
        low = np.where(wanted == 0, high, low)
    return tuple(high.tolist())
