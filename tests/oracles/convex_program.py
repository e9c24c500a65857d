"""The convex program written down literally in cvxpy: no decomposition, one cone solver.

CVXPY's ExpCone(x, y, z) means y exp(x / y) <= z, so q >= c exp(-k b) is ExpCone(-k b, 1, q / c).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


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
    """1 to 4 groups, correlated inputs, budgets from tight to slack, kappa and c over decades."""
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
    share = rng.uniform(0, 1.1)
    norms = np.array([np.linalg.norm(w @ h, 2) for w, h in zip(W, H, strict=True)])
    sums = np.array([np.linalg.norm(w, "nuc") for w in W])
    return Instance(
        W,
        H,
        lam=np.exp(rng.normal(size=groups)),
        kappa=energy * np.exp(rng.uniform(-3, 1, size=groups)),
        c=np.exp(rng.uniform(-1, 4, size=groups)),
        k=rng.uniform(0.7, 2, size=groups),
        p=p,
        b_min=b_min,
        b_max=b_max,
        budget=float(p @ (b_min + share * (b_max - b_min))),
        mu=norms * np.exp(rng.uniform(-4, -0.5, size=groups)) if form == "penalty" else None,
        tau=sums * rng.uniform(0.1, 0.9, size=groups) if form == "constrained" else None,
    )


def solve_by_cone(instance: Instance, solver: str = "CLARABEL", **options: Any) -> dict[str, Any]:
    """Objective, price, bits and low-rank matrices by a general conic solver."""
    import cvxpy as cp

    groups = len(instance.W)
    bits, q = cp.Variable(groups), cp.Variable(groups)
    objective, rows, low_rank = 0, [], []
    for g, (W, H) in enumerate(zip(instance.W, instance.H, strict=True)):
        C = np.linalg.cholesky(H)
        Z, R = cp.Variable(W.shape), cp.Variable(W.shape)
        low_rank.append(Z)
        objective += 0.5 * cp.sum_squares((W - Z - R) @ C) + instance.lam[g] * q[g]
        if instance.mu is not None:
            objective += instance.mu[g] * cp.normNuc(Z)
        else:
            rows.append(cp.normNuc(Z) <= instance.tau[g])
        decayed = (-instance.k[g] * bits[g], cp.Constant(1.0), q[g] / instance.c[g])
        rows += [cp.sum_squares(R) <= instance.kappa[g] * q[g], cp.ExpCone(*decayed)]
    # Scaled so that the row is of order one.
    budget = instance.p @ bits / instance.p.sum() <= instance.budget / instance.p.sum()
    rows += [bits >= instance.b_min, bits <= instance.b_max, budget]
    problem = cp.Problem(cp.Minimize(objective), rows)
    if solver == "CLARABEL" and not options:
        options = {"tol_gap_rel": 1e-10, "tol_gap_abs": 1e-10, "tol_feas": 1e-10}
    problem.solve(solver=solver, **options)
    return {
        "status": problem.status,
        "objective": float(problem.value),
        "price": float(budget.dual_value) / instance.p.sum(),
        "bits": np.asarray(bits.value),
        "low_rank": [Z.value for Z in low_rank],
    }
