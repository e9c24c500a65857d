"""Joint rate allocation: precision and rank compete for the same bits (the default convex form).

    minimise    sum_g alpha_g exp(v_g)
    subject to  v_g >= log c_g + psi_g(rho_g) - k_g b_g ,   sum_g p_g (b_g + rho_g) <= B ,
                b_min_g <= b_g <= b_max_g ,   0 <= rho_g <= rho_max_g

b_g is the residual's bits per weight, rho_g the factors' bits per weight, psi_g the lower convex
envelope of u_g = log(weighted energy left after the rank that rho_g buys). An exponential-cone
program; solved here without a cone solver, because it decomposes:

* Inside a group only t = b + rho matters. The best log-distortion at total rate t,
  E_g(t) = min_rho psi_g(rho) - k_g (t - rho), is an infimal convolution of piecewise-linear
  functions: all segments of psi_g and the one segment of b (slope -k_g), steepest first.
* At a price nu the group minimises alpha c exp(E(t)) + nu p t. On a segment of slope -s the
  optimum is where alpha c s exp(E) = nu p: one logarithm, no iteration.
* The price is found by bisection on the budget; total rate is continuous and falls with nu.

The dual value at the final price is a lower bound for every allocation within the budget.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from convex_caldera.allocate.menu import Floats, lower_hull
from convex_caldera.errors import DataError, InfeasibleBudgetError, RecipeError

HIGH_RATE_DECAY = 2 * math.log(2)  # 6.02 dB per bit: distortion falls fourfold (Bennett 1948)
SUM_ROUNDING = 1e-14  # relative; within it sums of p b_min in different orders are one budget
BISECTIONS = 200  # halvings of log nu; stops earlier when the bracket cannot shrink


@dataclass(frozen=True)
class RateModel:
    """Distortion model of one group: alpha c exp(psi(rho) - k b).

    Attributes:
        name: for messages.
        weights: p, number of original weights.
        alpha: loss per unit of relative distortion (nats of KL), >= 0.
        scale, decay: c and k of `fit_decay`, both > 0.
        bits: (b_min, b_max), bits per weight of the residual's codes.
        factor_bits: stored factor bits per weight at each rank on offer, strictly increasing,
            starting with 0.0 at rank 0.
        log_energy: u at those ranks: log of the weighted energy left, relative to rank 0.
    """

    name: str
    weights: int
    alpha: float
    scale: float
    decay: float
    bits: tuple[float, float]
    factor_bits: tuple[float, ...] = (0.0,)
    log_energy: tuple[float, ...] = (0.0,)

    def __post_init__(self) -> None:
        numbers = [self.weights, self.alpha, self.scale, self.decay, *self.bits]
        numbers += [*self.factor_bits, *self.log_energy]
        if not all(math.isfinite(x) for x in numbers):
            raise DataError(f"{self.name}: the rate model has NaN or infinite entries: {self}")
        if self.weights < 0 or self.alpha < 0 or self.scale <= 0 or self.decay <= 0:
            raise DataError(
                f"{self.name}: weights and alpha must be >= 0, scale and decay > 0; got "
                f"{self.weights}, {self.alpha}, {self.scale}, {self.decay}"
            )
        if not 0 <= self.bits[0] <= self.bits[1]:
            raise RecipeError(f"{self.name}: need 0 <= b_min <= b_max, got {self.bits}")
        rising = all(a < b for a, b in pairwise(self.factor_bits))
        same = len(self.factor_bits) == len(self.log_energy) > 0
        if not (rising and same and self.factor_bits[0] == 0):
            raise DataError(
                f"{self.name}: factor_bits must rise from 0, one log_energy each; got "
                f"{self.factor_bits} and {self.log_energy}"
            )


@dataclass(frozen=True)
class Allocation:
    """What the convex program says; `surrogate_gap` is its own gap, never the plan's.

    Attributes:
        bits, factor_bits: b_g and rho_g per group, bits per weight.
        log_distortion: v_g = log c + psi(rho) - k b.
        primal: sum alpha exp(v), feasible.
        dual: Lagrangian bound at `price` (nats per bit).
        surrogate_gap: (primal - dual) / max(|primal|, tiny), >= 0.
        used_bits: sum p (b + rho) <= budget_bits.
    """

    bits: tuple[float, ...]
    factor_bits: tuple[float, ...]
    log_distortion: tuple[float, ...]
    primal: float
    dual: float
    surrogate_gap: float
    price: float
    used_bits: float
    budget_bits: float


def fit_decay(bits: Sequence[float], distortions: Sequence[float]) -> tuple[float, float]:
    """(c, k) of distortion = c exp(-k b), least squares on the logarithm.

    Args:
        bits: at least two different bit widths at which the real quantizer was measured.
        distortions: its relative distortion at each, > 0.

    Raises:
        DataError: fewer than two widths, a distortion that is not positive and finite, or
            distortions that do not fall with the bits (k <= 0).
    """
    b, d = np.asarray(bits, dtype=float), np.asarray(distortions, dtype=float)
    if b.shape != d.shape or b.ndim != 1 or len(np.unique(b)) < 2:
        raise DataError(f"a decay needs two different bit widths, got bits {list(bits)}")
    if not (np.isfinite(b).all() and np.isfinite(d).all() and (d > 0).all()):
        raise DataError(f"distortions must be positive and finite, got {list(distortions)}")
    center = b - b.mean()
    decay = -float(center @ np.log(d)) / float(center @ center)
    if decay <= 0:
        raise DataError(
            f"distortion does not fall with the bits (fitted k = {decay:.3g}) at {list(bits)}: "
            f"{list(distortions)}; measure the quantizer again"
        )
    return math.exp(float(np.log(d).mean()) + decay * float(b.mean())), decay


def solve_surrogate(models: Sequence[RateModel], budget_bits: float) -> Allocation:
    """Optimal b_g and rho_g under sum p (b + rho) <= budget_bits, with its duality gap.

    Raises:
        InfeasibleBudgetError: the budget is below sum p b_min; carries the least one.
        DataError: there are no groups.

    Cost: O(groups x ranks) per halving of the price bracket; milliseconds for hundreds of groups.

    Source: reverse water-filling (Shannon 1959; Cover and Thomas, section 10.3.3), extended by
    the envelope of rank. Differs: bits are counted per stored weight, factors included.
    """
    if not models:
        raise DataError("the surrogate has no groups; there is nothing to allocate")
    paths = _Paths(models)
    budget = _feasible_budget(paths, budget_bits)
    price = _search_price(paths, budget)
    return _allocation(models, paths, paths.rates(price), price, budget)


def _feasible_budget(paths: _Paths, budget_bits: float) -> float:
    """The budget; the least feasible one where it falls short of that by a rounded sum only."""
    least = paths.used(np.zeros_like(paths.width))
    if budget_bits >= least * (1.0 - SUM_ROUNDING):
        return max(float(budget_bits), least)
    raise InfeasibleBudgetError(
        f"the budget of {budget_bits} bits is below sum p b_min = {least} bits; raise it or "
        "lower b_min",
        math.ceil(least),
    )


class _Paths:
    """Every group's E_g(t) as segments, steepest first, padded to one array."""

    def __init__(self, models: Sequence[RateModel]):
        rows = [_segments(model) for model in models]
        depth = max(len(row) for row in rows)
        self.steep = np.zeros((len(rows), depth))
        self.width = np.zeros((len(rows), depth))
        self.is_bits = np.zeros((len(rows), depth), dtype=bool)
        for g, row in enumerate(rows):
            for j, (steep, width, is_bits) in enumerate(row):
                self.steep[g, j], self.width[g, j], self.is_bits[g, j] = steep, width, is_bits
        self.weights = np.array([model.weights for model in models], dtype=float)
        self.alpha = np.array([model.alpha for model in models], dtype=float)
        self.least = np.array([model.bits[0] for model in models], dtype=float)
        start = [math.log(m.scale) + m.log_energy[0] - m.decay * m.bits[0] for m in models]
        self.start = np.array(start)
        falls = np.cumsum(self.steep * self.width, axis=1)
        self.level = self.start[:, None] - np.concatenate(
            [np.zeros((len(rows), 1)), falls[:, :-1]], axis=1
        )

    def rates(self, price: float) -> Floats:
        """Width taken of every segment (groups, depth) at a price >= 0."""
        with np.errstate(divide="ignore", invalid="ignore"):
            # On a segment of slope -s:  alpha s exp(E) = nu p  at  E = log(nu p / (alpha s)).
            target = np.log(price * self.weights[:, None]) - np.log(
                self.alpha[:, None] * self.steep
            )
            wanted = (self.level - target) / self.steep
        wanted = np.where(self.steep > 0, wanted, 0.0)
        # A group without weight is free: it takes everything; one that does not react, nothing.
        free = (price * self.weights == 0) & (self.alpha > 0)
        wanted = np.where(free[:, None], np.inf, wanted)
        wanted = np.where((self.alpha == 0)[:, None], 0.0, wanted)
        return np.clip(wanted, 0.0, self.width)

    def used(self, rates: Floats) -> float:
        return math.fsum(self.weights * (self.least + rates.sum(axis=1)))

    def value(self, rates: Floats) -> Floats:
        """v_g at given segment widths."""
        return self.start - (self.steep * rates).sum(axis=1)


def _segments(model: RateModel) -> list[tuple[float, float, bool]]:
    """(slope lost per bit, width, whether it is b) of E_g, steepest first, b first among equals."""
    x, u = list(model.factor_bits), list(model.log_energy)
    rows = [(model.decay, model.bits[1] - model.bits[0], True)]
    hull = lower_hull(x, u)
    for i, j in pairwise(hull):
        rows.append(((u[i] - u[j]) / (x[j] - x[i]), x[j] - x[i], False))
    return sorted(rows, key=lambda row: (-row[0], not row[2]))


def _search_price(paths: _Paths, budget: float) -> float:
    """The least price (to rounding) whose demand is within the budget; 0 if all fits."""
    if paths.used(paths.rates(0.0)) <= budget:
        return 0.0
    live = (paths.alpha > 0) & (paths.weights > 0)
    # Marginal values of the first and last bit bracket the price of the budget.
    value = paths.alpha[live] / paths.weights[live]
    steep = paths.steep[live]
    ends = paths.level[live] - steep * paths.width[live]
    logs = np.log(np.where(steep > 0, steep, 1.0)) + np.log(value)[:, None]
    low = float(np.where(steep > 0, logs + ends, np.inf).min()) - 1.0
    high = float(np.where(steep > 0, logs + paths.level[live], -np.inf).max()) + 1.0
    for _ in range(BISECTIONS):
        middle = 0.5 * (low + high)
        if not low < middle < high:
            break
        if paths.used(paths.rates(math.exp(middle))) <= budget:
            high = middle
        else:
            low = middle
    return math.exp(high)


def _allocation(
    models: Sequence[RateModel], paths: _Paths, rates: Floats, price: float, budget: float
) -> Allocation:
    v = paths.value(rates)
    used = paths.used(rates)
    primal = float(paths.alpha @ np.exp(v))
    # The rates minimise the Lagrangian at this price, so its value there is the dual's.
    dual = primal + price * (used - budget)
    bits = paths.least + np.where(paths.is_bits, rates, 0.0).sum(axis=1)
    factors = np.where(paths.is_bits, 0.0, rates).sum(axis=1)
    tiny = float(np.finfo(float).tiny)
    return Allocation(
        tuple(bits.tolist()),
        tuple(factors.tolist()),
        tuple(v.tolist()),
        primal,
        dual,
        max(primal - dual, 0.0) / max(abs(primal), tiny),
        price,
        used,
        float(budget),
    )
