"""Accelerated proximal gradient descent with backtracking and restart, over several matrices.

Minimises F(Z_1, .., Z_G) + sum_g penalty_g(Z_g), F convex and smooth, by

    Z+ = prox( Y - grad F(Y) / L ),   Y+ = Z+ + beta (Z+ - Z),

Nesterov's beta, set back to zero whenever the momentum points uphill. L is per matrix: a local
curvature told by F times a common factor that grows until the step descends, capped by a known
global bound.

Source: Beck and Teboulle, FISTA, SIAM J. Imaging Sci. 2009; restart: O'Donoghue and Candes,
arXiv 1204.3982 (the gradient scheme).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from convex_caldera.linalg.thresholding import Factored

GROWTH, DECAY = 1.3, 0.95  # of the curvature factor, after a failed and a successful step
LEAST_FACTOR = 0.3  # F curves less along most steps than it could
CURVATURE_FLOOR = 1e-9  # of the global bound, where F is locally flat
CURVATURE_ROUNDING = 1e-6  # relative; a quadratic F meets the curvature test with equality


class Smooth(Protocol):
    """F at a point: gradients on demand, and a local curvature per matrix."""

    @property
    def curvature(self) -> Sequence[float]: ...

    def gradient(self, g: int) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Iterate:
    """One step's result: dense matrices, their factors, and F there (with what it computed)."""

    dense: list[Tensor]
    factors: list[Factored]
    smooth: Any


def descend(
    smooth: Callable[[list[Tensor]], Smooth],
    prox: Callable[[int, Tensor, float], Factored],
    start: list[Tensor],
    most_curvature: Sequence[float],
    done: Callable[[int, Iterate], bool],
    most_steps: int,
) -> tuple[Iterate, int]:
    """Run until `done(step, iterate)` or `most_steps`; returns the last iterate and the steps.

    Args:
        smooth: F at a list of matrices.
        prox: (g, G, L) -> argmin_Z penalty_g(Z) + L/2 ||Z - G||^2, factored.
        start: first point.
        most_curvature: per matrix, a bound on the curvature of F in it.
        done: asked after every step.
    """
    old = point = start
    theta, factors = 1.0, [1.0] * len(start)
    step = 0
    while True:
        step += 1
        iterate, used = _backtrack(smooth, prox, point, most_curvature, factors)
        if done(step, iterate) or step >= most_steps:
            return iterate, step
        new = iterate.dense
        uphill = sum(
            L * float(((y - z) * (z - x)).sum())
            for L, y, z, x in zip(used, point, new, old, strict=True)
        )
        theta = 1.0 if uphill > 0 else theta
        after = 0.5 * (1.0 + (1.0 + 4.0 * theta * theta) ** 0.5)
        beta = (theta - 1.0) / after
        point = [z + beta * (z - x) for z, x in zip(new, old, strict=True)] if beta else new
        old, theta, factors = new, after, [max(LEAST_FACTOR, DECAY * factor) for factor in factors]


def _backtrack(
    smooth: Callable[[list[Tensor]], Smooth],
    prox: Callable[[int, Tensor, float], Factored],
    point: list[Tensor],
    cap: Sequence[float],
    factors: list[float],
) -> tuple[Iterate, list[float]]:
    """A step along which F curves no more than its model; widens `factors` where it has to.

    The test, per matrix, is <grad F(Z+) - grad F(Y), Z+ - Y> <= L ||Z+ - Y||^2: the mean
    curvature along the step. Unlike a comparison of values it loses no digits near the optimum,
    and its ratio says at once by how much L was too small.
    """
    here = smooth(point)
    local = [max(c, CURVATURE_FLOOR * m) for c, m in zip(here.curvature, cap, strict=True)]
    while True:
        used = [min(m, f * c) for m, f, c in zip(cap, factors, local, strict=True)]
        steps = [
            prox(g, y - here.gradient(g) / L if L > 0 else y, L)
            for g, (y, L) in enumerate(zip(point, used, strict=True))
        ]
        dense = [factored.dense() for factored in steps]
        there = smooth(dense)
        fits = True
        for g, (y, z, L) in enumerate(zip(point, dense, used, strict=True)):
            move = z - y
            curved = float(((there.gradient(g) - here.gradient(g)) * move).sum())
            allowed = L * float(move.square().sum())
            if curved > allowed * (1.0 + CURVATURE_ROUNDING) and L < cap[g]:
                factors[g] *= max(GROWTH, curved / allowed)
                fits = False
        if fits:
            return Iterate(dense, steps, there), used
