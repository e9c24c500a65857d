"""The convex program written down literally in cvxpy: no decomposition, one cone solver.

CVXPY's ExpCone(x, y, z) means y exp(x / y) <= z, so q >= c exp(-k b) is ExpCone(-k b, 1, q / c).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

BOX_MARGIN = 1e-3  # bits from an end of the box within which they count as at it
TINY = 1e-300
TIGHT = {"tol_gap_rel": 1e-10, "tol_gap_abs": 1e-10, "tol_feas": 1e-10}  # of Clarabel


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
    instance: Instance, solver: str = "CLARABEL", *, scaled: bool = False, **options: Any
) -> dict[str, Any]:
    """Objective, price, bits, multipliers s and low-rank matrices by a general conic solver.

    `scaled` states it with q in units of W's energy, and the objective in units of what W costs
    under H: cones of many orders of magnitude are where such solvers give up.

    `stationarity` and `violation` are the solver's own relative errors: of
    (lam - kappa s) c k e^{-k b} = nu p over groups whose bits are inside their box, and of the
    budget and q >= c e^{-k b}. `achieved` is what its bits, low rank and residual really cost once
    they are moved into the constraints: of several answers the best is that of the least.
    """
    import cvxpy as cp

    groups = len(instance.W)
    middle, unit, whole = np.zeros(groups), np.ones(groups), 1.0
    if scaled:
        middle = 0.5 * (instance.b_min + instance.b_max)
        unit = np.array([np.sum(W * W) for W in instance.W]) / instance.kappa
        whole = sum(_cost(W, H) for W, H in zip(instance.W, instance.H, strict=True))
    bits, u = cp.Variable(groups), cp.Variable(groups)
    objective, rows, low_rank, residuals, energies = 0, [], [], [], []
    for g, (W, H) in enumerate(zip(instance.W, instance.H, strict=True)):
        C = np.linalg.cholesky(H)
        Z, R = cp.Variable(W.shape), cp.Variable(W.shape)
        low_rank.append(Z)
        residuals.append(R)
        objective += 0.5 / whole * cp.sum_squares((W - Z - R) @ C)
        objective += instance.lam[g] * unit[g] / whole * u[g]
        if instance.mu is not None:
            objective += instance.mu[g] / whole * cp.normNuc(Z)
        else:
            rows.append(cp.normNuc(Z) <= instance.tau[g])
        least = instance.c[g] * np.exp(-instance.k[g] * middle[g])
        decayed = (-instance.k[g] * (bits[g] - middle[g]), cp.Constant(1.0), unit[g] / least * u[g])
        energies.append(cp.sum_squares(R) / unit[g] <= instance.kappa[g] * u[g])
        rows += [energies[g], cp.ExpCone(*decayed)]
    # Scaled so that the row is of order one.
    budget = instance.p @ bits / instance.p.sum() <= instance.budget / instance.p.sum()
    rows += [bits >= instance.b_min, bits <= instance.b_max, budget]
    problem = cp.Problem(cp.Minimize(objective), rows)
    if solver == "CLARABEL" and not options:
        options = TIGHT
    problem.solve(solver=solver, **options)
    price, b = whole * float(budget.dual_value) / instance.p.sum(), np.asarray(bits.value)
    s = np.array([np.ravel(row.dual_value)[0] for row in energies])
    s = s * whole / unit
    decay = instance.c * np.exp(-instance.k * b)
    pull, push = (instance.lam - instance.kappa * s) * instance.k * decay, price * instance.p
    inside = (b > instance.b_min + BOX_MARGIN) & (b < instance.b_max - BOX_MARGIN)
    over = [instance.p @ b / instance.budget - 1.0, *(1.0 - np.asarray(u.value) * unit / decay)]
    return {
        "status": problem.status,
        "objective": whole * float(problem.value),
        "achieved": achieved(instance, b, values(low_rank), values(residuals)),
        "price": price,
        "bits": b,
        "multipliers": s,
        "low_rank": values(low_rank),
        "stationarity": float(np.abs(pull - push)[inside].max(initial=0.0) / max(push.max(), TINY)),
        "violation": max(over),
    }


def values(variables: list[Any]) -> list[np.ndarray]:
    return [variable.value for variable in variables]


def achieved(
    instance: Instance, bits: np.ndarray, low_rank: list[np.ndarray], residual: list[np.ndarray]
) -> float:
    """Objective of a point that is moved into the box, the budget and the ball of tau."""
    b = np.clip(bits, instance.b_min, instance.b_max)
    spent, free = instance.p @ b, instance.p @ (b - instance.b_min)
    if spent > instance.budget:
        b = instance.b_min + (b - instance.b_min) * (1 - (spent - instance.budget) / free)
    total = 0.0
    for g, (Z, R) in enumerate(zip(low_rank, residual, strict=True)):
        nuclear = float(np.linalg.norm(Z, "nuc"))
        inside = 1.0 if instance.tau is None else min(1.0, instance.tau[g] / max(nuclear, TINY))
        decay = instance.c[g] * np.exp(-instance.k[g] * b[g])
        q = max(decay, np.sum(R * R) / instance.kappa[g])
        total += _cost(instance.W[g] - inside * Z - R, instance.H[g]) + instance.lam[g] * q
        total += 0.0 if instance.mu is None else instance.mu[g] * nuclear
    return float(total)


def _cost(E: np.ndarray, H: np.ndarray) -> float:
    """Half of tr(E H E^T)."""
    return float(0.5 * np.sum((E @ H) * E))
