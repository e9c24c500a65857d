"""Laws of the replayed plan bounds: against brute force, and against the allocator's own plans."""

from __future__ import annotations

import itertools
import json
import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convex_caldera.allocate import allocate
from convex_caldera.allocate.curves import Curves, Group, Option, curves_to_dict
from convex_caldera.certify.core_bound import no_plan_below
from convex_caldera.certify.knapsack import (
    check_bound,
    check_membership,
    merged,
    price_bound,
    read_curves,
    read_plan,
)
from convex_caldera.errors import CheckError, ConvexCalderaError, FormatError
from tests.examples import examples

menus = st.lists(
    st.lists(st.tuples(st.integers(0, 40), st.floats(0, 10, width=16)), min_size=1, max_size=4),
    min_size=1,
    max_size=4,
)


def curves_of(rows, ties=()):
    groups = [
        Group(f"g{i}", 8, tuple(Option(f"o{j}", w, d) for j, (w, d) in enumerate(menu)))
        for i, menu in enumerate(rows)
    ]
    return Curves(tuple(groups), ties)


def plans(curves, budget):
    """(bits, exact distortion) of every plan within the budget, by enumeration."""
    units = [list(merged(curves, unit).values()) for unit in curves.units]
    for options in itertools.product(*units):
        bits = sum(w for w, _ in options)
        if bits <= budget:
            yield bits, sum((d for _, d in options), Fraction())


def replay(curves, plan):
    read_plan(plan)
    check_membership(curves, plan)
    check_bound(curves, plan)


@given(menus, st.integers(0, 160), st.floats(0, 5))
@examples(150)
def test_price_bound_holds_for_every_plan(rows, budget, price):
    curves = read_curves(curves_to_dict(curves_of(rows)))
    bound = price_bound(curves, Fraction(price), budget)
    assert all(bound <= distortion for _, distortion in plans(curves, budget))


@given(menus, st.integers(0, 160), st.floats(0, 5), st.fractions(0, 40))
@examples(150)
def test_core_search_agrees_with_enumeration(rows, budget, price, claim):
    curves = read_curves(curves_to_dict(curves_of(rows)))
    units = [list(merged(curves, unit).values()) for unit in curves.units]
    found = [d for _, d in plans(curves, budget)]
    for value in {claim, *found}:
        expected = all(d >= value for d in found)
        assert no_plan_below(value, units, Fraction(price), budget) == expected


@given(menus, st.data())
@examples(100)
def test_allocators_plans_are_accepted_and_flattery_is_not(rows, data):
    tie = (("g0", "g1"),) if len(rows) > 1 and data.draw(st.booleans()) else ()
    ours = curves_of(rows, tie)
    curves = read_curves(json.loads(json.dumps(curves_to_dict(ours))))
    least = sum(min(w for w, _ in merged(curves, unit).values()) for unit in curves.units)
    most = sum(max(w for w, _ in merged(curves, unit).values()) for unit in curves.units)
    budget = data.draw(st.integers(least, most + 3))
    plan = read_plan(json.loads(json.dumps(allocate(ours, budget).to_dict())))
    replay(curves, plan)
    best = min(d for _, d in plans(curves, budget))
    if plan["proof"] in ("price", "core"):
        assert Fraction(plan["distortion"]) >= best >= Fraction(plan["bound"])
    flattered = [
        {"bound": math.nextafter(plan["bound"], math.inf)},
        {"distortion": math.nextafter(plan["distortion"], -1.0)},
        {"bits": plan["bits"] - 1},
        {"budget_bits": plan["bits"] - 1},
    ]
    if plan["plan_gap"]:
        flattered.append({"plan_gap": plan["plan_gap"] * (1 - 1e-9)})
    if plan["core_bound"] is not None:
        flattered.append({"core_bound": plan["distortion"] * (1 + 1e-9) + 1e-300})
    for change in flattered:
        if min(change.values()) < 0:
            continue
        with pytest.raises(ConvexCalderaError):
            replay(curves, {**plan, **change})


def test_ties_must_be_obeyed():
    ours = curves_of([[(1, 2.0), (2, 1.0)], [(1, 2.0), (2, 1.0)]], (("g0", "g1"),))
    curves = read_curves(curves_to_dict(ours))
    plan = read_plan(allocate(ours, 3).to_dict())
    plan["choice"]["g1"] = "o1"
    plan["bits"], plan["bits_per_weight"] = 3, 3 / 16
    with pytest.raises(CheckError, match="tie"):
        check_membership(curves, plan)


def test_a_negative_price_bounds_nothing():
    curves = read_curves(curves_to_dict(curves_of([[(1, 1.0)]])))
    with pytest.raises(CheckError, match="negative"):
        price_bound(curves, Fraction(-1), 1)


@pytest.mark.parametrize(
    "damage",
    [
        {"groups": []},
        {"groups": [{"name": "a", "weights": 1, "options": []}]},
        {
            "groups": [
                {
                    "name": "a",
                    "weights": -1,
                    "options": [_o := {"label": "x", "bits": 1, "distortion": 1.0}],
                }
            ]
        },
        {"groups": [{"name": "a", "weights": 1, "options": [_o, _o]}]},
        {"groups": [{"name": "a", "weights": 1, "options": [{**_o, "bits": True}]}]},
        {"groups": [{"name": "a", "weights": 1, "options": [{**_o, "distortion": float("nan")}]}]},
        {"groups": [{"name": "a", "weights": 1, "options": [_o]}], "ties": [["b"]]},
        {"groups": [{"name": "a", "weights": 1, "options": [_o]}], "ties": [["a", "a"]]},
        {"groups": [{"name": "a", "weights": 1, "options": [_o]}], "more": 1},
        [],
        None,
    ],
)
def test_malformed_curves_are_refused(damage):
    with pytest.raises(FormatError):
        read_curves(damage)
