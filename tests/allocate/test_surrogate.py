"""The joint rate allocation meets a conic solver, reverse water-filling and its own dual."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from convex_caldera.allocate import RateModel, fit_decay, solve_surrogate
from convex_caldera.errors import DataError, InfeasibleBudgetError, RecipeError
from tests.examples import examples

GAP = 1e-12  # the price is bisected to the last bit of its logarithm


def random_models(count: int, seed: int) -> list[RateModel]:
    """Energies that fall unevenly with rank, so that some ranks lie above the envelope."""
    rng = np.random.default_rng(seed)
    models = []
    for g in range(count):
        ranks = int(rng.integers(1, 6))
        rate = np.concatenate([[0.0], np.cumsum(rng.uniform(0.05, 0.5, ranks))])
        energy = np.concatenate([[0.0], -np.cumsum(rng.uniform(0.0, 1.0, ranks))])
        models.append(
            RateModel(
                f"g{g}",
                int(rng.integers(10, 1000)),
                float(np.exp(rng.normal())),
                float(rng.uniform(0.2, 2)),
                float(rng.uniform(0.8, 1.8)),
                (1.0, float(rng.uniform(3, 8))),
                tuple(rate.tolist()),
                tuple(energy.tolist()),
            )
        )
    return models


def ends(models: list[RateModel]) -> tuple[float, float]:
    least = sum(m.weights * m.bits[0] for m in models)
    return least, sum(m.weights * (m.bits[1] + m.factor_bits[-1]) for m in models)


def envelope(model: RateModel, rho: float) -> float:
    """psi by definition: the least convex combination of two points that meet at rho."""
    best = math.inf
    points = list(zip(model.factor_bits, model.log_energy, strict=True))
    for x0, u0 in points:
        for x1, u1 in points:
            if x0 <= rho <= x1:
                share = (rho - x0) / (x1 - x0) if x1 > x0 else 0.0
                best = min(best, u0 + share * (u1 - u0))
    return best


@given(st.integers(1, 5), st.integers(0, 10**6), st.floats(0, 1.2))
@examples(80)
def test_surrogate_is_feasible_and_certified(count, seed, where):
    models = random_models(count, seed)
    least, most = ends(models)
    budget = least + where * (most - least)
    found = solve_surrogate(models, budget)
    assert found.used_bits <= budget
    assert 0 <= found.surrogate_gap <= GAP
    assert found.dual <= found.primal
    total = 0.0
    for model, b, rho, v in zip(
        models, found.bits, found.factor_bits, found.log_distortion, strict=True
    ):
        assert model.bits[0] <= b <= model.bits[1] + 1e-12
        assert 0 <= rho <= model.factor_bits[-1] + 1e-12
        value = math.log(model.scale) + envelope(model, min(rho, model.factor_bits[-1]))
        value -= model.decay * b
        assert v == pytest.approx(value, abs=1e-9)
        total += model.alpha * math.exp(v)
    assert found.primal == pytest.approx(total, rel=1e-12)


@given(st.integers(1, 4), st.integers(0, 10**6))
@examples(30)
def test_surrogate_no_exchange_of_bits_helps(count, seed):
    models = random_models(count, seed)
    least, most = ends(models)
    found = solve_surrogate(models, 0.5 * (least + most))
    rng = np.random.default_rng(seed)
    for _ in range(20):
        b = np.clip(
            np.array(found.bits) + 0.1 * rng.normal(size=count),
            [m.bits[0] for m in models],
            [m.bits[1] for m in models],
        )
        rho = np.clip(
            np.array(found.factor_bits) + 0.1 * rng.normal(size=count),
            0,
            [m.factor_bits[-1] for m in models],
        )
        used = sum(m.weights * (x + y) for m, x, y in zip(models, b, rho, strict=True))
        if used > found.budget_bits:
            continue
        value = sum(
            m.alpha * math.exp(math.log(m.scale) + envelope(m, y) - m.decay * x)
            for m, x, y in zip(models, b, rho, strict=True)
        )
        assert value >= found.primal * (1 - 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_surrogate_meets_a_conic_solver(seed):
    cp = pytest.importorskip("cvxpy", reason="cvxpy is the oracle; pip install cvxpy")
    models = random_models(3, seed)
    least, most = ends(models)
    budget = least + (0.2 + 0.2 * seed) * (most - least)
    scale = sum(m.weights for m in models)
    v, b, rho = cp.Variable(3), cp.Variable(3), cp.Variable(3)
    rows = [
        sum(m.weights * (b[g] + rho[g]) for g, m in enumerate(models)) / scale <= budget / scale
    ]
    for g, m in enumerate(models):
        rows += [b[g] >= m.bits[0], b[g] <= m.bits[1], rho[g] >= 0, rho[g] <= m.factor_bits[-1]]
        # A convex combination of the points is above the envelope and reaches it.
        share = cp.Variable(len(m.factor_bits), nonneg=True)
        rows += [cp.sum(share) == 1, share @ np.array(m.factor_bits) == rho[g]]
        rows += [v[g] >= math.log(m.scale) + share @ np.array(m.log_energy) - m.decay * b[g]]
    alphas = np.array([m.alpha for m in models])
    problem = cp.Problem(cp.Minimize(alphas @ cp.exp(v)), rows)
    problem.solve(solver=cp.CLARABEL, tol_gap_rel=1e-10, tol_gap_abs=1e-10, tol_feas=1e-10)
    found = solve_surrogate(models, budget)
    assert found.primal == pytest.approx(problem.value, rel=1e-6)
    assert found.price * scale == pytest.approx(float(rows[0].dual_value), rel=1e-4, abs=1e-6)
    total = np.array(found.bits) + np.array(found.factor_bits)
    assert total == pytest.approx(b.value + rho.value, abs=1e-3)


def test_surrogate_without_rank_is_reverse_water_filling():
    models = [RateModel(f"g{g}", 100, 1.0, 4.0**g, math.log(4), (0.0, 20.0)) for g in range(4)]
    found = solve_surrogate(models, 100 * 4 * 3.0)
    # Equal distortions: each fourfold variance takes one more bit.
    assert found.bits == pytest.approx((1.5, 2.5, 3.5, 4.5), abs=1e-9)


def test_surrogate_rank_that_buys_nothing_gets_no_bits():
    flat = RateModel("flat", 10, 1.0, 1.0, 1.386, (1, 8), (0.0, 1.0), (0.0, -0.5))
    steep = RateModel("steep", 10, 1.0, 1.0, 1.386, (1, 8), (0.0, 1.0), (0.0, -3.0))
    found = solve_surrogate([flat, steep], 10 * 2 * 3.0)
    assert found.factor_bits[0] == 0.0
    assert found.factor_bits[1] == 1.0


def test_surrogate_groups_that_do_not_matter_get_the_least():
    models = random_models(2, 3)
    idle = RateModel("idle", 50, 0.0, 1.0, 1.0, (1.0, 4.0))
    empty = RateModel("empty", 0, 1.0, 1.0, 1.0, (1.0, 4.0))
    least, most = ends(models)
    found = solve_surrogate([*models, idle, empty], 50 + 0.5 * (least + most))
    assert found.bits[2:] == (1.0, 4.0)
    assert found.surrogate_gap <= GAP


def test_surrogate_infeasible_budget_names_the_least():
    model = RateModel("g", 100, 1.0, 1.0, 1.386, (2.0, 4.0))
    with pytest.raises(InfeasibleBudgetError, match=r"200") as caught:
        solve_surrogate([model], 199.0)
    assert caught.value.least_bits == 200
    assert solve_surrogate([model], 200.0).bits == (2.0,)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize("count", range(1, 12))
def test_surrogate_at_the_least_budget_is_b_min_in_any_order_of_summation(count, alpha):
    models = [RateModel(f"g{g}", 7, alpha, 1.0, 1.386, (0.1 + 0.1 * g, 4.0)) for g in range(count)]
    products = [model.weights * model.bits[0] for model in models]
    for budget in (sum(products), sum(reversed(products)), math.fsum(products)):
        found = solve_surrogate(models, budget)
        assert found.bits == pytest.approx([model.bits[0] for model in models])
        assert found.used_bits <= found.budget_bits == pytest.approx(budget, rel=1e-14)
        assert 0 <= found.surrogate_gap <= GAP
        if alpha == 0.0:
            assert found.primal == found.dual == found.price == 0.0


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"alpha": math.nan}, DataError),
        ({"scale": 0.0}, DataError),
        ({"decay": -1.0}, DataError),
        ({"bits": (4.0, 2.0)}, RecipeError),
        ({"factor_bits": (0.0, 0.0), "log_energy": (0.0, -1.0)}, DataError),
        ({"factor_bits": (0.5,)}, DataError),
        ({"log_energy": (0.0, 1.0)}, DataError),
    ],
)
def test_surrogate_bad_model_is_refused(change, error):
    good = {"name": "g", "weights": 4, "alpha": 1.0, "scale": 1.0, "decay": 1.0, "bits": (1.0, 2.0)}
    with pytest.raises(error, match="g"):
        RateModel(**{**good, **change})


@given(st.floats(1e-6, 1e6), st.floats(0.1, 5))
def test_decay_recovers_an_exact_exponential(scale, decay):
    bits = [1.0, 2.0, 3.5, 5.0]
    c, k = fit_decay(bits, [scale * math.exp(-decay * b) for b in bits])
    assert c == pytest.approx(scale, rel=1e-9)
    assert k == pytest.approx(decay, rel=1e-9)


@pytest.mark.parametrize(
    ("bits", "loss"),
    [([2, 2], [1, 1]), ([2], [1]), ([2, 3], [1, 0]), ([2, 3], [1, 2]), ([2, 3], [1, math.nan])],
)
def test_decay_bad_measurements_are_refused(bits, loss):
    with pytest.raises(DataError):
        fit_decay(bits, loss)
