"""The joint rate program: the recomputed dual is below every allocation, and so is the solver's."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import asdict
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from convex_caldera.allocate.surrogate import RateModel, solve_surrogate
from convex_caldera.certify.surrogate import compare, dual_value, read_group, tangent_bound
from convex_caldera.errors import CheckError, FormatError
from tests.examples import examples

positive = st.floats(0.1, 3)
models = st.builds(
    RateModel,
    name=st.just("g"),
    weights=st.integers(1, 50),
    alpha=st.just(0.0) | st.floats(1e-3, 3),
    scale=positive,
    decay=positive,
    bits=st.tuples(st.floats(0, 2), st.floats(2, 6)),
    factor_bits=st.just((0.0, 0.5, 1.5)),
    log_energy=st.tuples(st.floats(-1, 1), st.floats(-1, 1), st.floats(-1, 1)),
)


def solved(rows, budget):
    found = solve_surrogate(rows, budget)
    groups = [
        read_group(
            {**asdict(m), "bits": list(m.bits), "factor_bits": list(m.factor_bits)}
            | {"log_energy": list(m.log_energy), "solution_bits": b, "solution_factor_bits": r}
        )
        for m, b, r in zip(rows, found.bits, found.factor_bits, strict=True)
    ]
    record = {"primal": found.primal, "dual": found.dual, "gap": found.surrogate_gap}
    return groups, json.loads(json.dumps(record | {"price": float(found.price)}))


@given(st.lists(models, min_size=1, max_size=3), st.floats(0.01, 1))
@examples(80)
def test_solver_is_accepted_and_flattery_is_not(rows, share):
    least = sum(m.weights * m.bits[0] for m in rows)
    most = sum(m.weights * (m.bits[1] + 1.5) for m in rows)
    budget = least + share * (most - least)
    groups, record = solved(rows, budget)
    compare(groups, record, budget)
    size = record["primal"] + record["price"] * budget
    if record["primal"] > 0:
        for key, change in (("dual", 1e-3 * size), ("primal", -1e-3 * size)):
            with pytest.raises(CheckError):
                compare(groups, {**record, key: record[key] + change}, budget)


@given(models, st.floats(0, 3))
@examples(80)
def test_dual_is_below_a_grid_of_allocations(model, price):
    groups, _ = solved([model], 1e6)
    bound = dual_value(groups, Decimal(price), Decimal(0))
    for b, rho in itertools.product(np.linspace(*model.bits, 9), (0.0, 0.25, 0.5, 1.0, 1.5)):
        u = np.interp(rho, model.factor_bits, model.log_energy)  # at or above the envelope
        value = model.alpha * model.scale * math.exp(u - model.decay * b)
        value += price * model.weights * (b + rho)
        assert float(bound) <= value * (1 + 1e-12)


@pytest.mark.parametrize("rate", ["0", "0.3", "5"])
def test_tangent_bound_is_the_minimum_of_one_segment(rate):
    found = tangent_bound(Decimal(2), Decimal(rate), [(Decimal("1.5"), Decimal(3))])
    x = np.linspace(0, 3, 300_001)
    least = (2 * np.exp(-1.5 * x) + float(rate) * x).min()
    assert float(found) == pytest.approx(least, rel=1e-8)
    assert float(found) <= least


def test_malformed_groups_are_refused():
    good = asdict(RateModel("g", 1, 1.0, 1.0, 1.0, (0.0, 1.0)))
    good = {**good, "bits": [0.0, 1.0], "factor_bits": [0.0], "log_energy": [0.0]}
    good |= {"solution_bits": 0.5, "solution_factor_bits": 0.0}
    read_group(good)
    for change in (
        {"bits": [1.0, 0.0]},
        {"scale": 0.0},
        {"alpha": -1.0},
        {"factor_bits": [0.1]},
        {"log_energy": []},
        {"weights": 1.5},
        {"more": 1},
    ):
        with pytest.raises(FormatError):
            read_group({**good, **change})
