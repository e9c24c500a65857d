"""A choice that is kept while its options' distortions change: the bound holds for the new ones."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest

from convex_caldera.allocate.curves import Curves, Group, Option
from convex_caldera.allocate.plan import allocate, certify_choice


def random_curves(seed: int, groups: int = 4) -> Curves:
    dice = random.Random(seed)
    return Curves(
        tuple(
            Group(f"g{i}", 64, tuple(
                Option(f"{bits}b", 64 * bits, dice.uniform(0.5, 1.5) * 4.0**-bits)
                for bits in (2, 3, 4)
            ))
            for i in range(groups)
        )
    )  # fmt: skip


def refitted(curves: Curves, choice: dict[str, str], factor: float) -> Curves:
    """Every chosen option's distortion times a factor."""
    return Curves(
        tuple(
            replace(g, options=tuple(
                replace(o, distortion=o.distortion * factor) if o.label == choice[g.name] else o
                for o in g.options
            ))
            for g in curves.groups
        )
    )  # fmt: skip


def best(curves: Curves, budget: int) -> float:
    """The least distortion of all plans, by going through them."""
    plans = itertools.product(*(group.options for group in curves.groups))
    return min(sum(o.distortion for o in p) for p in plans if sum(o.bits for o in p) <= budget)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("factor", [0.6, 1.0, 1.7])
def test_bound_and_gap_are_those_of_the_new_distortions(seed: int, factor: float) -> None:
    curves, budget = random_curves(seed), 64 * 11
    plan = allocate(curves, budget)
    later = refitted(curves, plan.choice, factor)
    found = certify_choice(later, plan)
    assert (found.choice, found.bits, found.price) == (plan.choice, plan.bits, plan.price)
    assert found.distortion == pytest.approx(factor * plan.distortion)
    assert found.bound <= best(later, budget) <= found.distortion
    assert found.plan_gap >= found.distortion / best(later, budget) - 1 - 1e-12
    assert found.proof in ("price", "none")


def test_unchanged_curves_keep_the_price_bound() -> None:
    curves = random_curves(9)
    plan = allocate(curves, 64 * 11)
    assert certify_choice(curves, plan).bound == plan.bound
