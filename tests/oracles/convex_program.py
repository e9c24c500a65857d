"""The convex program written down literally in cvxpy: no decomposition, one cone solver.

CVXPY's ExpCone(x, y, z) means y exp(x / y) <= z, so q >= c exp(-k b) is ExpCone(-k b, 1, q / c).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

BOX_MARGIN = 1e-3  # bits from an end of the box within which they count as at it
TINY = 1e-300


@dataclass(frozen=True, eq=False)
class Instance:
    """Groups of the program; exactly one of mu and tau is given."""

    W: list[np.ndarray]
    H: list[np.ndarray]
    lam: np.ndarray
    kappa: np.ndarray
    c: np.ndarray
    k: np.ndarray
    p: np.ndarray
    b_min: np.ndarray
    b_max: np.ndarray
    budget: float
    mu: np.ndarray | None = None
    tau: np.ndarray | None = None

    def constants(self) -> dict[str, Any]:
        """Keyword arguments of `solve_program` besides W and H."""
        names = ("lam", "kappa", "c", "k", "p", "b_min", "b_max", "budget", "mu", "tau")
        return {name: getattr(self, name) for name in names}


def random_instance(seed: int, form: str, most: int = 12) -> Instance:
    """1 to 4 groups, correlated inputs, kappa and c over decades, budgets from tight to slack.

    c puts the bits at which the quantizer's distortion meets the energy of W anywhere between a
    little below b_min and a little above b_max, so that about half of the budgets bind.
    """
    rng = np.random.default_rng(seed)
    groups = int(rng.integers(1, 5))
    W, H = [], []
    for _ in range(groups):
        m, n = rng.integers(3, most + 1, size=2)
        W.append(rng.normal(size=(m, 2)) @ rng.normal(size=(2, n)) + 0.3 * rng.normal(size=(m, n)))
        X = rng.normal(size=(n, 2 * n)) * np.exp(0.5 * rng.normal(size=(n, 1)))
        H.append(X @ X.T / (2 * n) + 0.01 * np.eye(n))
    energy = np.array([np.sum(w * w) for w in W])
    p = rng.integers(10, 100, size=groups).astype(float)
    b_min, b_max = np.ones(groups), rng.uniform(4, 8, size=groups)
    kappa, k = energy * np.exp(rng.uniform(-3, 1, size=groups)), rng.uniform(0.7, 2, size=groups)
    meeting = b_min - 1 + rng.uniform(size=groups) * (b_max - b_min + 2)
    share = rng.uniform(0, 1.1)
    lam = np.exp(rng.normal(size=groups))
    # From ||W H_s|| on, at the largest s, Z is zero.
    s = lam / kappa
    norms = np.array(
        [np.linalg.norm(w @ saturated(h, 2 * x), 2) for w, h, x in zip(W, H, s, strict=True)]
    )
    sums = np.array([np.linalg.norm(w, "nuc") for w in W])
    return Instance(
        W,
        H,
        lam=lam,
        kappa=kappa,
        c=energy / kappa * np.exp(k * meeting),
        k=k,
        p=p,
        b_min=b_min,
        b_max=b_max,
        budget=float(p @ (b_min + share * (b_max - b_min))),
        mu=norms * np.exp(rng.uniform(-4, 0, size=groups)) if form == "penalty" else None,
        tau=sums * rng.uniform(0.1, 0.9, size=groups) if form == "constrained" else None,
    )


def saturated(H: np.ndarray, most: float) -> np.ndarray:
    """H_s with every eigenvalue h lowered to most h / (most + h), most = 2 s."""
    return most * np.linalg.solve(H + most * np.eye(len(H)), H)


def solve_by_cone(
    instance: Instance, solver: str = "CLARABEL", *, scaled: bool = True, **options: Any
) -> dict[str, Any]:
    """Objective, price, bits, multipliers s and low-rank matrices by a general conic solver.

    `scaled` states it with q in units of what the middle of the box costs, and the objective in
    units of W's energy: cones of many orders of magnitude are where such solvers give up.

    `stationarity` and `violation` are the solver's own relative errors: of
    (lam - kappa s) c k e^{-k b} = nu p over groups whose bits are inside their box, and of the
    budget and q >= c e^{-k b}.
    """
    import cvxpy as cp

    groups = len(instance.W)
    middle = 0.5 * (instance.b_min + instance.b_max) if scaled else np.zeros(groups)
    unit = instance.c * np.exp(-instance.k * middle)
    energy = (0.5 * ((W @ H) * W).sum() for W, H in zip(instance.W, instance.H, strict=True))
    whole = float(sum(energy)) if scaled else 1.0
    bits, u = cp.Variable(groups), cp.Variable(groups)
    objective, rows, low_rank, energies = 0, [], [], []
    for g, (W, H) in enumerate(zip(instance.W, instance.H, strict=True)):
        C = np.linalg.cholesky(H)
        Z, R = cp.Variable(W.shape), cp.Variable(W.shape)
        low_rank.append(Z)
        objective += 0.5 / whole * cp.sum_squares((W - Z - R) @ C)
        objective += instance.lam[g] * unit[g] / whole * u[g]
        if instance.mu is not None:
            objective += instance.mu[g] / whole * cp.normNuc(Z)
        else:
            rows.append(cp.normNuc(Z) <= instance.tau[g])
        decayed = (-instance.k[g] * (bits[g] - middle[g]), cp.Constant(1.0), u[g])
        energies.append(cp.sum_squares(R) / (instance.kappa[g] * unit[g]) <= u[g])
        rows += [energies[g], cp.ExpCone(*decayed)]
    # Scaled so that the row is of order one.
    budget = instance.p @ bits / instance.p.sum() <= instance.budget / instance.p.sum()
    rows += [bits >= instance.b_min, bits <= instance.b_max, budget]
    problem = cp.Problem(cp.Minimize(objective), rows)
    if solver == "CLARABEL" and not options:
        options = {"tol_gap_rel": 1e-10, "tol_gap_abs": 1e-10, "tol_feas": 1e-10}
    problem.solve(solver=solver, **options)
    price, b = whole * float(budget.dual_value) / instance.p.sum(), np.asarray(bits.value)
    s = np.array([np.ravel(row.dual_value)[0] for row in energies])
    s = s * whole / (instance.kappa * unit)
    decay = instance.c * np.exp(-instance.k * b)
    pull, push = (instance.lam - instance.kappa * s) * instance.k * decay, price * instance.p
    inside = (b > instance.b_min + BOX_MARGIN) & (b < instance.b_max - BOX_MARGIN)
    over = [instance.p @ b / instance.budget - 1.0, *(1.0 - np.asarray(u.value) * unit / decay)]
    return {
        "status": problem.status,
        "objective": whole * float(problem.value),
        "price": price,
        "bits": b,
        "multipliers": s,
        "low_rank": [Z.value for Z in low_rank],
        "stationarity": float(np.abs(pull - push)[inside].max(initial=0.0) / max(push.max(), TINY)),
        "violation": max(over),
    }
