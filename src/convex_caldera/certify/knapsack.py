"""The plan and its price bound, replayed in exact rational arithmetic.

Stored doubles are rationals, so nothing here is rounded. For any price nu >= 0 and any plan that
takes one option per group, ties sharing a label, within a budget of B bits,

    sum_u min_o [ d_u(o) + nu w_u(o) ] - nu B   <=   distortion of the plan,

u over the units that are decided together (a tie, or a group that is in none), with bits and
distortions added within a unit. A claimed bound must not exceed the left side, a claimed
distortion must not lie below the plan's, and a claimed gap not below distortion / bound - 1.

Source: Everett, Operations Research 11 (1963); Lagrangian bound of the knapsack.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from convex_caldera.certify.core_bound import no_plan_below
from convex_caldera.certify.strict import listing, natural, number, short, string, table
from convex_caldera.errors import CheckError, FormatError

PROOFS = {
    "price": "optimal",
    "core": "optimal by complete search",
    "milp": "optimal on HiGHS's word",
    "none": "not proved optimal",
}
CORE_SLACK = Fraction(1, 10**9)  # what the integer arithmetic of a search may leave open
Menu = dict[str, tuple[int, Fraction]]  # label -> stored bits, distortion
PLAN_KEYS = (
    "choice",
    "budget_bits",
    "bits",
    "weights",
    "distortion",
    "price",
    "bound",
    "core_bound",
    "plan_gap",
    "gap_before_milp",
    "milp_status",
    "milp_bound",
    "proof",
    "optimal",
    "bits_per_weight",
)


@dataclass(frozen=True)
class Curves:
    """Menus by group, original weights by group, and the units that share a label."""

    menus: Mapping[str, Menu]
    weights: Mapping[str, int]
    units: tuple[tuple[str, ...], ...]


def read_curves(value: Any) -> Curves:
    """{"groups": [{"name", "weights", "options": [{"label", "bits", "distortion"}]}], "ties"}."""
    record = table(value, ("groups",), "curves", optional=("ties",))
    menus: dict[str, Menu] = {}
    weights: dict[str, int] = {}
    for i, item in enumerate(listing(record["groups"], "curves.groups")):
        where = f"curves.groups[{i}]"
        table(item, ("name", "weights", "options"), where)
        name = string(item["name"], f"{where}.name")
        if name in menus:
            raise FormatError(f"{where}: two groups are called {short(name)}")
        weights[name] = natural(item["weights"], f"{where}.weights")
        menus[name] = _menu(item["options"], where)
    if not menus:
        raise FormatError("curves: no groups")
    return Curves(menus, weights, _units(record.get("ties", []), menus))


def _menu(value: Any, where: str) -> Menu:
    menu: Menu = {}
    for i, item in enumerate(listing(value, f"{where}.options")):
        here = f"{where}.options[{i}]"
        table(item, ("label", "bits", "distortion"), here)
        label = string(item["label"], f"{here}.label")
        if label in menu:
            raise FormatError(f"{here}: the label {short(label)} appears twice")
        distortion = number(item["distortion"], f"{here}.distortion", 0.0)
        menu[label] = natural(item["bits"], f"{here}.bits"), Fraction(distortion)
    if not menu:
        raise FormatError(f"{where}: a group without options")
    return menu


def _units(value: Any, menus: Mapping[str, Menu]) -> tuple[tuple[str, ...], ...]:
    units = []
    free = dict.fromkeys(menus)
    for i, tie in enumerate(listing(value, "curves.ties")):
        members = tuple(string(name, f"curves.ties[{i}]") for name in listing(tie, "curves.ties"))
        for name in members:
            if name not in free:
                raise FormatError(f"curves.ties[{i}]: {short(name)} is no group, or tied twice")
            del free[name]
        if not members:
            raise FormatError(f"curves.ties[{i}] is empty")
        units.append(members)
    return (*units, *((name,) for name in free))


def merged(curves: Curves, unit: tuple[str, ...]) -> Menu:
    """The menu of a unit: labels that all members have, bits and distortions added."""
    menus = [curves.menus[name] for name in unit]
    labels = [label for label in menus[0] if all(label in menu for menu in menus)]
    return {
        label: (
            sum(menu[label][0] for menu in menus),
            sum((menu[label][1] for menu in menus), Fraction()),
        )
        for label in labels
    }


def price_bound(curves: Curves, price: Fraction, budget_bits: int) -> Fraction:
    """sum_u min_o [ d_u(o) + price w_u(o) ] - price B. Raises CheckError below a price of 0."""
    if price < 0:
        raise CheckError(f"the price {float(price)} is negative: it bounds nothing")
    total = -price * budget_bits
    for unit in curves.units:
        menu = merged(curves, unit)
        if not menu:
            raise CheckError(f"the tie of {short(unit[0])} has no label in common")
        total += min(distortion + price * bits for bits, distortion in menu.values())
    return total


def read_plan(value: Any) -> dict[str, Any]:
    """The record of a plan with every number in range; infinite gaps are null."""
    plan = table(value, PLAN_KEYS, "plan")
    if not isinstance(plan["choice"], dict):
        raise FormatError("plan.choice must be an object")
    for name in ("budget_bits", "bits", "weights"):
        natural(plan[name], f"plan.{name}")
    for name in ("distortion", "price", "bits_per_weight"):
        number(plan[name], f"plan.{name}", 0.0)
    number(plan["bound"], "plan.bound")
    for name in ("plan_gap", "gap_before_milp"):
        if plan[name] is not None:
            number(plan[name], f"plan.{name}", 0.0)
    for name in ("core_bound", "milp_bound"):
        if plan[name] is not None:
            number(plan[name], f"plan.{name}")
    if plan["proof"] not in tuple(PROOFS):
        raise FormatError(f"plan.proof: {short(plan['proof'])}")
    string(plan["milp_status"], "plan.milp_status")
    if plan["optimal"] is not (plan["proof"] != "none"):
        raise CheckError("plan.optimal contradicts plan.proof")
    return plan


def check_membership(curves: Curves, plan: Mapping[str, Any]) -> str:
    """One known label for every group, ties obeyed, bits added up, the budget kept."""
    choice = plan["choice"]
    if set(choice) != set(curves.menus):
        odd = sorted(set(choice) ^ set(curves.menus))[0]
        raise CheckError(f"the plan and the curves disagree about the group {short(odd)}")
    for name, label in choice.items():
        if not isinstance(label, str) or label not in curves.menus[name]:
            raise CheckError(f"{short(name)}: {short(label)} is not on its menu")
    for unit in curves.units:
        if len({choice[name] for name in unit}) != 1:
            raise CheckError(
                f"the tie of {short(unit[0])} has {short(choice[unit[-1]])} and others"
            )
    bits = sum(curves.menus[name][label][0] for name, label in choice.items())
    if bits != plan["bits"]:
        raise CheckError(f"the chosen options take {bits} bits, not {plan['bits']}")
    if bits > plan["budget_bits"]:
        raise CheckError(f"{bits} bits exceed the budget of {plan['budget_bits']}")
    weights = sum(curves.weights.values())
    if weights != plan["weights"] or plan["bits_per_weight"] != (bits / weights if weights else 0):
        raise CheckError(f"{bits} bits over {weights} weights are not what the plan says")
    return f"{len(choice)} groups, {bits} of {plan['budget_bits']} bits"


def plan_distortion(curves: Curves, plan: Mapping[str, Any]) -> Fraction:
    """Exact distortion of the chosen options."""
    chosen = (curves.menus[name][label][1] for name, label in plan["choice"].items())
    return sum(chosen, Fraction())


def check_bound(curves: Curves, plan: Mapping[str, Any]) -> str:
    """The claimed bound, distortion and gaps against their exact values; none may flatter."""
    value = plan_distortion(curves, plan)
    bound = price_bound(curves, Fraction(plan["price"]), plan["budget_bits"])
    if bound > value:
        raise CheckError("the bound exceeds the plan's distortion: the plan is over its budget")
    if Fraction(plan["bound"]) > bound:
        raise CheckError(f"bound {plan['bound']!r} is claimed, the price gives {float(bound)!r}")
    if Fraction(plan["distortion"]) < value:
        claimed = plan["distortion"]
        raise CheckError(f"distortion {claimed!r} is claimed, the options have {float(value)!r}")
    core = plan["core_bound"]  # replayed below
    best = bound if core is None else max(bound, Fraction(core))
    for name, proved in (("plan_gap", best), ("gap_before_milp", bound)):
        if plan[name] is not None and not _covers(Fraction(plan[name]), value, proved):
            raise CheckError(f"{name} {plan[name]!r} is claimed, less than the exact gap")
    if plan["proof"] == "price" and value != bound:
        raise CheckError("the plan is called proved by its price, but bound and value differ")
    _check_core(curves, plan, value)
    shown = "" if plan["plan_gap"] is None else f", gap {plan['plan_gap']:.3g}"
    return f"{float(value):.6g} >= {float(best):.6g}{shown}, {PROOFS[plan['proof']]}"


def _check_core(curves: Curves, plan: Mapping[str, Any], value: Fraction) -> None:
    """The claimed core bound by complete search; with proof "core" it meets the distortion."""
    if plan["core_bound"] is None:
        if plan["proof"] == "core":
            raise CheckError("the plan is called proved by its core, but has no core bound")
        return
    claim = Fraction(plan["core_bound"])
    if plan["proof"] == "core" and claim < value * (1 - CORE_SLACK):
        raise CheckError("the plan is called optimal, but its core bound is below its distortion")
    menus = [list(merged(curves, unit).values()) for unit in curves.units]
    price, budget = Fraction(plan["price"]), plan["budget_bits"]
    if claim > value or not no_plan_below(claim, menus, price, budget):
        raise CheckError(f"core_bound {plan['core_bound']!r} is claimed, a better plan exists")


def _covers(claimed: Fraction, value: Fraction, bound: Fraction) -> bool:
    """claimed >= value / bound - 1, where 0 / 0 counts as no gap."""
    if value == bound:
        return True
    return bound > 0 and claimed * bound >= value - bound
