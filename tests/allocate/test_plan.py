"""The plan is optimal where brute force can look, never above the budget, and proves itself."""

import itertools
import json
import math
from fractions import Fraction
from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from convex_caldera.allocate import Curves, Group, Option, allocate, core_search, frontier
from convex_caldera.errors import InfeasibleBudgetError, RecipeError
from tests.examples import examples
from tests.oracles.core_replay import no_plan_below


def random_curves(groups: int, options: int, seed: int, noise: float = 1.0) -> Curves:
    """Exponential curves with so much noise that they are neither convex nor monotone."""
    rng = np.random.default_rng(seed)
    made = []
    for g in range(groups):
        weights = int(rng.integers(64, 2048))
        scale = 1e-3 * math.exp(rng.normal())
        menu = []
        for o in range(options):
            bits = float(rng.uniform(1, 8))
            loss = scale * math.exp(-1.386 * bits + noise * rng.normal())
            menu.append(Option(f"o{o:02d}", int(weights * bits), loss))
        made.append(Group(f"g{g:03d}", weights, tuple(menu)))
    return Curves(tuple(made))


def brute_force(curves: Curves, budget: int) -> Fraction:
    combos = itertools.product(*(group.options for group in curves.groups))
    return min(
        sum(Fraction(o.distortion) for o in combo)
        for combo in combos
        if sum(o.bits for o in combo) <= budget
    )


def replayed_bound(curves: Curves, price: float, budget: int) -> Fraction:
    """The five lines of a checker (no ties)."""
    nu = Fraction(price)
    least = (min(Fraction(o.distortion) + nu * o.bits for o in g.options) for g in curves.groups)
    return sum(least) - nu * budget


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 10**6), st.floats(0, 1))
@examples(60)
def test_plan_equals_brute_force(groups, options, seed, where):
    curves = random_curves(groups, options, seed)
    least = sum(min(o.bits for o in g.options) for g in curves.groups)
    most = sum(max(o.bits for o in g.options) for g in curves.groups)
    budget = least + int(where * (most - least))
    plan = allocate(curves, budget)
    chosen = [curves.group(name).option(label) for name, label in plan.choice.items()]
    value = sum(Fraction(o.distortion) for o in chosen)
    assert value == brute_force(curves, budget)
    assert plan.bits == sum(o.bits for o in chosen) <= budget
    assert plan.optimal
    bound = replayed_bound(curves, plan.price, budget)
    assert Fraction(plan.bound) <= bound <= value <= Fraction(plan.distortion)
    assert math.isclose(plan.bound, bound, rel_tol=1e-15)
    proved = max(bound, Fraction(plan.core_bound or 0.0))
    if proved > 0:
        assert value / proved - 1 <= Fraction(plan.plan_gap) <= 1e-9  # it is the best, and says so
    assert plan.gap_before_milp >= plan.plan_gap


@given(st.integers(0, 10**6), st.floats(0, 1))
@examples(20)
def test_plan_of_tied_groups_equals_brute_force(seed, where):
    curves = random_curves(5, 4, seed)
    curves = Curves(curves.groups, (("g001", "g003", "g004"),))
    joined = [[(o, o, o) for o in range(4)], *[[(o,) for o in range(4)]] * 2]
    members = [[1, 3, 4], [0], [2]]
    plans = []
    for combo in itertools.product(*joined):
        picks = dict(zip(chain(*members), chain(*combo), strict=True))
        options = [curves.groups[g].options[o] for g, o in picks.items()]
        bits = sum(o.bits for o in options)
        plans.append((bits, sum(Fraction(o.distortion) for o in options)))
    least, most = min(plans)[0], max(plans)[0]
    budget = least + int(where * (most - least))
    plan = allocate(curves, budget)
    assert plan.choice["g001"] == plan.choice["g003"] == plan.choice["g004"]
    chosen = [curves.group(name).option(label) for name, label in plan.choice.items()]
    assert sum(Fraction(o.distortion) for o in chosen) == min(d for b, d in plans if b <= budget)


def menus_of(curves: Curves) -> list[list[tuple[int, Fraction]]]:
    return [[(o.bits, Fraction(o.distortion)) for o in group.options] for group in curves.groups]


@pytest.mark.parametrize("seed", range(4))
def test_plan_core_bound_replays_and_meets_the_plan(seed):
    curves = random_curves(40, 12, seed, noise=0.3)
    budget = int((2 + 0.5 * seed) * curves.weights)
    plan = allocate(curves, budget)
    assert plan.proof == "core"
    bound, price = Fraction(plan.core_bound), Fraction(plan.price)
    assert bound <= Fraction(plan.distortion)
    assert plan.distortion <= plan.core_bound * (1 + 1e-13)
    assert no_plan_below(bound, menus_of(curves), price, budget)
    inflated = Fraction(plan.distortion) * (1 + Fraction(1, 10**9))
    assert not no_plan_below(inflated, menus_of(curves), price, budget)


def test_plan_of_many_equal_groups_is_proved():
    """Equal layers make equal plans; the search has to merge them."""
    menu = tuple(Option(f"{b}", 100 * b, 4.0**-b) for b in range(1, 8))
    curves = Curves(tuple(Group(f"g{g:03d}", 100, menu) for g in range(100)))
    plan = allocate(curves, 100 * 325 + 50)
    assert plan.proof == "core"
    # A quarter of the layers take one bit more: 25 x 4^-4 + 75 x 4^-3.
    assert plan.distortion == pytest.approx(25 * 4.0**-4 + 75 * 4.0**-3, rel=1e-12)


def test_plan_with_a_core_too_large_asks_highs(monkeypatch):
    monkeypatch.setattr(core_search, "MOST_STATES", 3)
    curves = random_curves(30, 12, 2, noise=0.3)
    budget = int(2.5 * curves.weights)
    plan = allocate(curves, budget)
    assert plan.proof == "milp"
    assert plan.core_bound is None
    monkeypatch.undo()
    best = allocate(curves, budget)
    assert plan.choice == best.choice
    assert plan.milp_bound == pytest.approx(best.distortion, rel=1e-6)


def test_plan_without_milp_has_a_small_honest_gap():
    curves = random_curves(80, 20, 3, noise=0.2)
    plan = allocate(curves, int(2.2 * curves.weights), exact=False)
    assert 0 <= plan.plan_gap <= 1e-3
    assert plan.plan_gap == plan.gap_before_milp
    assert plan.milp_bound is None
    assert "exact=False" in plan.milp_status


def test_plan_running_out_of_time_says_so(monkeypatch):
    monkeypatch.setattr(core_search, "MOST_STATES", 3)
    curves = random_curves(60, 12, 5)
    plan = allocate(curves, int(3 * curves.weights), time_limit=0.0)
    assert not plan.optimal
    assert plan.proof == "none"
    assert "ime" in plan.milp_status
    assert plan.plan_gap > 0


def test_plan_is_the_same_in_any_order():
    curves = random_curves(12, 8, 11)
    turned = Curves(
        tuple(Group(g.name, g.weights, g.options[::-1]) for g in reversed(curves.groups))
    )
    budget = int(2.5 * curves.weights)
    assert allocate(curves, budget).choice == allocate(turned, budget).choice


def test_plan_ties_in_value_go_to_the_first_name():
    menu = (Option("a", 8, 1.0), Option("b", 8, 1.0), Option("c", 16, 0.5))
    curves = Curves((Group("y", 4, menu), Group("x", 4, menu)))
    assert allocate(curves, 24).choice == {"x": "c", "y": "a"}


def test_plan_ample_budget_has_no_gap_and_no_price():
    curves = random_curves(9, 6, 2)
    plan = allocate(curves, 10**9)
    assert (plan.price, plan.plan_gap, plan.proof) == (0.0, 0.0, "price")
    assert plan.distortion == pytest.approx(
        sum(min(o.distortion for o in g.options) for g in curves.groups)
    )


def test_plan_infeasible_budget_names_the_least_and_the_pins():
    curves = random_curves(4, 5, 1)
    least = sum(min(o.bits for o in g.options) for g in curves.groups)
    with pytest.raises(InfeasibleBudgetError, match=str(least)) as caught:
        allocate(curves, least - 1)
    assert caught.value.least_bits == least
    assert allocate(curves, least).bits == least
    widest = max(curves.groups[2].options, key=lambda o: o.bits)
    extra = widest.bits - min(o.bits for o in curves.groups[2].options)
    with pytest.raises(InfeasibleBudgetError, match=rf"g002 \(\+{extra} bits\)") as caught:
        allocate(curves, least, pins={"g002": widest.label})
    assert caught.value.least_bits == least + extra


def test_plan_keeps_pins():
    curves = random_curves(6, 5, 8)
    plan = allocate(curves, int(5 * curves.weights), pins={"g004": "o03"})
    assert plan.choice["g004"] == "o03"


@pytest.mark.parametrize("budget", [1.5e3, True, "100", None])
def test_plan_budget_must_be_whole_bits(budget):
    with pytest.raises(RecipeError, match="whole number"):
        allocate(random_curves(2, 2, 0), budget)


def test_plan_zero_distortion_and_zero_weights_are_fine():
    curves = Curves((Group("a", 0, (Option("0", 0, 0.0),)), Group("b", 4, (Option("4", 16, 0.0),))))
    plan = allocate(curves, 16)
    assert (plan.distortion, plan.bound, plan.plan_gap) == (0.0, 0.0, 0.0)
    json.dumps(plan.to_dict(), allow_nan=False)


def test_frontier_points_are_optimal_plans_at_their_own_budget():
    curves = random_curves(5, 6, 21)
    front = frontier(curves)
    assert np.all(np.diff(front.bits) > 0)
    assert np.all(np.diff(front.distortions) < 0)
    assert np.all(np.diff(front.prices) <= 0)
    for i in range(len(front)):
        plan = allocate(curves, int(front.bits[i]))
        assert plan.distortion == pytest.approx(front.distortions[i], rel=1e-12)
        assert plan.plan_gap == 0.0
        assert plan.choice == front.choice(i)
        assert plan.bits == front.bits[i]
