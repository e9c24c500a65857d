"""The settled scalars of the convex program obey their optimality conditions in every regime."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from convex_caldera.allocate.price import Rates, rate_value, saturation, settle
from convex_caldera.allocate.program import solve_program
from tests.examples import examples

ROUNDING = 1e-9  # relative; roots are found to 1e-15 of the unknown y = lambda / kappa - s


def random_rates(seed: int) -> tuple[Rates, np.ndarray]:
    """1 to 6 groups; decades of kappa and c, so that b_min, b_max and both ends of s all bind."""
    rng = np.random.default_rng(seed)
    groups, n = int(rng.integers(1, 7)), int(rng.integers(1, 9))
    h = np.exp(rng.normal(size=(groups, n)) * rng.choice([0.0, 1.0, 3.0]))
    h[rng.uniform(size=h.shape) < 0.1] = 0.0
    a = np.exp(rng.normal(size=(groups, n)) * 2)
    p = rng.integers(1, 100, size=groups).astype(float)
    b_min = rng.uniform(0, 3, size=groups)
    b_max = b_min + rng.uniform(0, 6, size=groups)
    share = rng.uniform(0, 1.1)
    rates = Rates(
        lam=np.exp(rng.normal(size=groups) * 2),
        kappa=np.exp(rng.normal(size=groups) * 2),
        c=np.exp(rng.normal(size=groups) * 3),
        k=rng.uniform(0.5, 2, size=groups),
        p=p,
        b_min=b_min,
        b_max=b_max,
        budget=float(p @ (b_min + share * (b_max - b_min))),
        h=h,
    )
    return rates, a


def energy(rates: Rates, a: np.ndarray, s: np.ndarray) -> np.ndarray:
    return (a * saturation(rates, s) ** 2).sum(axis=1)


@given(st.integers(0, 10**6))
@examples(200)
def test_settle_meets_the_optimality_conditions(seed):
    rates, a = random_rates(seed)
    found = settle(rates, a)
    most = rates.lam / rates.kappa
    assert np.all((found.s >= 0) & (found.s <= most))
    assert np.all((found.bits >= rates.b_min) & (found.bits <= rates.b_max))
    assert rates.p @ found.bits <= rates.budget * (1 + 1e-12)
    assert found.energy == pytest.approx(energy(rates, a, found.s), rel=ROUNDING)
    allowed = rates.kappa * rates.distortion(found.bits)
    # s > 0 only where R is held back, s < lambda / kappa only where the bits are.
    assert np.all(found.energy[found.s == 0] <= allowed[found.s == 0] * (1 + ROUNDING))
    held = found.s < most * (1 - ROUNDING)
    slack = held & (found.s > most * ROUNDING)
    assert found.energy[slack] == pytest.approx(allowed[slack], rel=1e-6)


@given(st.integers(0, 10**6))
@examples(100)
def test_settle_is_a_saddle_point(seed):
    """No other multipliers or price give a larger dual value, and the primal value equals it."""
    rates, a = random_rates(seed)
    found = settle(rates, a)

    def dual(s: np.ndarray, price: float) -> float:
        quadratic = 0.5 * (a * 2 * s[:, None] * saturation(rates, s)).sum()
        return float(quadratic + rate_value(rates, s, price).sum() - price * rates.budget)

    taken = saturation(rates, found.s)
    misfit = 0.5 * (a * (1 - taken) ** 2 * rates.h).sum()
    q = np.maximum(found.energy / rates.kappa, rates.distortion(found.bits))
    primal = float(misfit + rates.lam @ q)
    best = dual(found.s, found.price)
    assert best == pytest.approx(primal, rel=1e-7)
    rng = np.random.default_rng(seed + 1)
    for _ in range(20):
        s = np.clip(found.s * np.exp(rng.normal(size=len(found.s))), 0, rates.lam / rates.kappa)
        assert dual(s, found.price * math.exp(rng.normal())) <= best + 1e-9 * abs(best)


def test_settle_at_least_bits_holds_the_residual_back():
    """One group whose price puts it at b_min, with more energy left than q = c e^{-k b_min}.

    There ||R||^2 = kappa q with 0 < s < lambda / kappa: dropping s to 0 loses what holds R.
    """
    one = np.ones(1)
    rates = Rates(0.1 * one, one, one, one, one, one, 8 * one, 1.0, np.full((1, 1), 0.5))
    high = math.exp(-1.0)
    found = settle(rates, np.full((1, 1), 1.2 * high))
    assert found.bits == pytest.approx([1.0])
    assert found.energy == pytest.approx([high], rel=1e-12)
    s = 0.25 * (math.sqrt(1.2) - 1.0)  # (h / (2 s + h))^2 = 1 / 1.2
    assert found.s == pytest.approx([s], rel=1e-9)


def test_program_takes_the_least_budget_in_any_order_of_summation():
    W = [torch.ones(2, 2) for _ in range(6)]
    b_min = [0.1 + 0.1 * g for g in range(6)]
    products = [7.0 * b for b in b_min]
    for budget in (sum(products), sum(reversed(products)), math.fsum(products)):
        found = solve_program(
            W, [None] * 6, mu=0.1, lam=1.0, kappa=1.0, c=1.0, k=1.0, p=7.0, b_min=b_min,
            b_max=8.0, budget=budget,
        )  # fmt: skip
        assert found.bits == pytest.approx(b_min)
        assert found.status == "optimal"


def test_program_converges_with_a_group_at_least_bits():
    """Eight alike groups and one so quiet that it stays at b_min: tens of steps, not thousands."""
    rng = np.random.default_rng(0)
    W, H = [], []
    for _ in range(8):
        W.append(torch.from_numpy(rng.normal(size=(48, 8)) * 2 * np.exp(rng.normal(size=(1, 8)))))
        X = rng.normal(size=(32, 8))
        H.append(torch.from_numpy(X.T @ X / 32))
    energy = np.array([float(w.square().sum()) for w in W])
    c = energy * np.array([0.5, 0.4, 0.6, 0.12, 0.3, 0.5, 1.2, 0.3])
    found = solve_program(
        W, H, mu=0.1, lam=1.0, kappa=energy / 60, c=c, k=1.35, p=384.0, b_min=2.0, b_max=8.0,
        budget=8 * 384 * 2.77, tol=1e-6, most_steps=200,
    )  # fmt: skip
    assert min(found.bits) == pytest.approx(2.0)
    assert found.status == "optimal"
