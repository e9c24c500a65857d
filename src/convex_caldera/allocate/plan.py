"""One option per group under a bit budget, with a bound that anyone can recheck.

Choosing options is a multiple-choice knapsack. For ANY price nu >= 0

    bound(nu) = sum_g min_o [ d_g(o) + nu w_g(o) ] - nu B   <=   distortion of every plan within B,

so (plan, nu) is a certificate: replaying it is a minimum per group and a sum. The best nu is the
slope at which the sorted hull segments exhaust the budget (frontier.py); exchanges repair the
integer plan (repair.py); a complete search of the core finds the best one and proves it
(core_search.py), or HiGHS where the core is too large (integer.py). Noisy and non-convex curves
are fine: no bound assumes shape. docs/certificate.md states the exact rules for a checker.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from numbers import Integral
from typing import Any

from convex_caldera.allocate.core_search import Searched, prepare_search
from convex_caldera.allocate.curves import Curves
from convex_caldera.allocate.frontier import Frontier, build_frontier, choice_of
from convex_caldera.allocate.integer import Integer, solve_core
from convex_caldera.allocate.menu import Menus, build_menus
from convex_caldera.allocate.repair import build_core, repair
from convex_caldera.errors import InfeasibleBudgetError, RecipeError

MOST_PINS_NAMED = 5
NOT_NEEDED = "not asked: the price bound already proves the plan"
NOT_SEARCHED = "not asked: the options were fitted again after the choice"
NOT_EXACT = "not asked: exact=False"
NOT_ASKED = "not asked: the core was searched completely"


@dataclass(frozen=True)
class Plan:
    """A label for every group, and what is proved about it.

    Attributes:
        choice: group name -> label.
        budget_bits, bits: what was allowed and what is used; bits <= budget_bits always.
        weights: original weights of all groups.
        distortion: sum of the chosen distortions, rounded up.
        price: nu, distortion per bit, of the bound.
        bound: the price bound at `price`, rounded down. Replayable from the curves in exact
            rational arithmetic by five lines; holds for every plan within the budget.
        core_bound: the bound of a complete search of the core, rounded down; equals the
            distortion to about 1e-15. Replayable too, by the search of docs/certificate.md
            section 3.1. None if none was needed, asked for, or finished.
        plan_gap: distortion / bound - 1 from the exact values, rounded up; 0 means optimal,
            infinity that the bound is zero and the distortion is not.
        gap_before_milp: the same after repair, before anything exact was tried.
        milp_status: what HiGHS said, or why it was not asked.
        milp_bound: HiGHS's lower bound on the distortion. NOT replayable: it rests on HiGHS's
            branch and bound in floating point. None if it was not asked.
        optimal: it is proved that no plan is better (see `proof`).
        proof: "price" (replayable: plan_gap is 0), "core" (replayable: core_bound), "milp"
            (HiGHS's word) or "none".
    """

    choice: dict[str, str]
    budget_bits: int
    bits: int
    weights: int
    distortion: float
    price: float
    bound: float
    core_bound: float | None
    plan_gap: float
    gap_before_milp: float
    milp_status: str
    milp_bound: float | None
    proof: str

    @property
    def optimal(self) -> bool:
        return self.proof != "none"

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over original weights."""
        return self.bits / self.weights if self.weights else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The JSON-able record of docs/certificate.md section 3; infinity becomes null."""
        record = {name: getattr(self, name) for name in self.__dataclass_fields__}
        for name in ("plan_gap", "gap_before_milp"):
            record[name] = record[name] if math.isfinite(record[name]) else None
        return record | {"optimal": self.optimal, "bits_per_weight": self.bits_per_weight}


def allocate(
    curves: Curves,
    budget_bits: int,
    *,
    pins: Mapping[str, str] | None = None,
    exact: bool = True,
    time_limit: float = 10.0,
) -> Plan:
    """The plan of least distortion within `budget_bits` total stored bits.

    Args:
        curves: measured options per group, and ties.
        budget_bits: an integer; never exceeded.
        pins: group name -> label that is fixed beforehand; binds the group's whole tie.
        exact: search the core for the best plan and its proof; where it is too large, HiGHS.
        time_limit: seconds for HiGHS; running out is told in `milp_status`.

    Raises:
        InfeasibleBudgetError: no plan fits; carries the least feasible budget, and names the
            pins that raise it.
        RecipeError: pins or ties contradict the curves, or the budget is not an integer.

    Cost: one sort of all options, O(core^2) for exchanges, and a search of the core that is
    usually smaller than either; 224 groups of 40 options take well under a second. The same
    curves give the same plan.

    Source: price search after Everett (1963) and Shoham and Gersho (1988); core after Pisinger,
    A minimal algorithm for the multiple-choice knapsack problem, EJOR 1995.
    """
    if isinstance(budget_bits, bool) or not isinstance(budget_bits, Integral):
        raise RecipeError(f"the budget is a whole number of bits, got {budget_bits!r}")
    budget = int(budget_bits)
    menus = build_menus(curves, pins)
    if menus.least_bits > budget:
        raise _infeasible(curves, menus, budget, pins)
    front = build_frontier(menus)
    return _solve(front, budget, curves.weights, exact, time_limit)


def frontier(curves: Curves, *, pins: Mapping[str, str] | None = None) -> Frontier:
    """All plans that are optimal at some price, cheapest first, in one sort.

    Point i is an optimal plan for the budget `bits[i]`; `choice(i)` names its labels.
    """
    return build_frontier(build_menus(curves, pins))


def _solve(front: Frontier, budget: int, weights: int, exact: bool, seconds: float) -> Plan:
    menus, price = front.menus, front.best_price(budget)
    bound = menus.bound(price, budget)
    core = build_core(menus, price)
    picks = front.picks(front.last_within(budget))
    gap = float(menus.distortion(picks) - bound)
    picks = repair(menus, picks, budget, core.below(gap))
    search = prepare_search(menus, core, price, budget, menus.distortion(picks))
    picks = search.repair(picks)
    before = menus.distortion(picks)
    searched, asked = Searched(None, None), Integer(None, NOT_NEEDED, None, False)
    if before > bound:
        asked = Integer(None, NOT_EXACT, None, False)
    if before > bound and exact:
        searched = search.best_below(before)
        asked = Integer(None, NOT_ASKED, None, False)
        if searched.bound is None:
            left = float(before - bound)
            asked = solve_core(menus, core.below(left), price, budget, left, seconds)
    for found in (searched.picks, asked.picks):
        if found is not None and menus.distortion(found) < menus.distortion(picks):
            picks = found
    return _finish(menus, picks, budget, weights, price, bound, before, searched, asked)


def _finish(
    menus: Menus,
    picks: list[int],
    budget: int,
    weights: int,
    price: float,
    bound: Fraction,
    before: Fraction,
    searched: Searched,
    asked: Integer,
) -> Plan:
    value = menus.distortion(picks)
    proof = "price" if value == bound else "core" if searched.bound is not None else "none"
    if proof == "none" and asked.proved:
        proof = "milp"
    share = asked.bound_share
    core = None if searched.bound is None else _rounded(searched.bound, up=False)
    return Plan(
        choice=choice_of(menus, picks),
        budget_bits=budget,
        bits=sum(menu.bits[i] for menu, i in zip(menus.menus, picks, strict=True)),
        weights=weights,
        distortion=_rounded(value, up=True),
        price=price,
        bound=_rounded(bound, up=False),
        core_bound=core,
        plan_gap=_relative(value, bound if core is None else max(bound, Fraction(core))),
        gap_before_milp=_relative(before, bound),
        milp_status=asked.status,
        milp_bound=None if share is None else float(bound) + share * float(before - bound),
        proof=proof,
    )


def _relative(value: Fraction, bound: Fraction) -> float:
    """value / bound - 1, rounded up; 0 / 0 counts as no gap."""
    if value == bound:
        return 0.0
    return _rounded(value / bound - 1, up=True) if bound > 0 else math.inf


def _rounded(value: Fraction, *, up: bool) -> float:
    """The nearest double on the asked side of an exact value."""
    number = float(value)
    wrong = Fraction(number) < value if up else Fraction(number) > value
    return math.nextafter(number, math.inf if up else -math.inf) if wrong else number


def _infeasible(
    curves: Curves, menus: Menus, budget: int, pins: Mapping[str, str] | None
) -> InfeasibleBudgetError:
    """Names the least feasible budget, and which pins cost how much of it."""
    least = menus.least_bits
    message = f"no plan fits {budget} bits: the cheapest one takes {least} bits"
    if curves.weights:
        message += f" ({least / curves.weights:.4f} bits per weight)"
    free = {menu.members: menu.bits[0] for menu in build_menus(curves).menus}
    extra = [
        (menu.bits[0] - free[menu.members], menu.members)
        for menu in menus.menus
        if menu.bits[0] > free[menu.members]
    ]
    if not extra:
        return InfeasibleBudgetError(f"{message}; raise the budget or offer cheaper options", least)
    extra.sort(key=lambda item: (-item[0], item[1]))
    named = ", ".join(
        f"{next(name for name in members if name in (pins or {}))} (+{bits} bits)"
        for bits, members in extra[:MOST_PINS_NAMED]
    )
    more = f" and {len(extra) - MOST_PINS_NAMED} more" if len(extra) > MOST_PINS_NAMED else ""
    without = least - sum(bits for bits, _ in extra)
    message += f"; the pins on {named}{more} cause it: without them {without} bits suffice"
    return InfeasibleBudgetError(message, least)
