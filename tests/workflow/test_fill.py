"""Uniform filling: never over budget, never room left for one more step of any layer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convex_caldera.errors import InfeasibleBudgetError
from convex_caldera.workflow.fill import Rungs, fill_uniformly, spread

HEADER = 17


def total(ladders):
    sizes = {ladder.name: ladder.sizes for ladder in ladders}
    return lambda choice: HEADER + sum(sizes[name][rung] for name, rung in choice.items())


@st.composite
def cases(draw):
    count = draw(st.integers(1, 7))
    ladders = []
    for i in range(count):
        steps = draw(st.lists(st.integers(1, 50), min_size=1, max_size=6))
        sizes = tuple(sum(steps[: k + 1]) for k in range(len(steps)))
        ladders.append(Rungs(f"layer{i}", draw(st.integers(1, 40)), sizes))
    return ladders, draw(st.integers(0, 1200))


@given(cases())
def test_filling_stays_within_the_budget(case):
    ladders, budget = case
    measure = total(ladders)
    least = measure({ladder.name: 0 for ladder in ladders})
    if least > budget:
        with pytest.raises(InfeasibleBudgetError) as caught:
            fill_uniformly(ladders, budget, measure)
        assert caught.value.least_bits == 8 * least
        return
    choice = fill_uniformly(ladders, budget, measure)
    assert measure(choice) <= budget
    assert set(choice) == {ladder.name for ladder in ladders}


def test_equal_layers_get_equal_rungs_before_any_gets_more():
    ladders = [Rungs(f"layer{i}", 8, (2, 3, 4)) for i in range(5)]
    choice = fill_uniformly(ladders, HEADER + 17, total(ladders))
    assert sorted(choice.values()) == [1, 1, 1, 2, 2]


def test_spread_visits_every_position_once_and_early_ones_far_apart():
    assert sorted(spread(11)) == list(range(11))
    assert spread(8)[:4] == [0, 4, 2, 6]
    assert spread(1) == [0]
