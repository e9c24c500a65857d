"""One candidate for every layer: the integer plan whose file is within the byte budget.

The integer program counts the bits of tensors; a file also has headers, whose length depends on
the plan. So the budget of the program is what the headers leave, found in a few rounds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from convex_caldera.allocate.curves import Curves
from convex_caldera.allocate.menu import build_menus
from convex_caldera.allocate.plan import Plan as IntegerPlan
from convex_caldera.allocate.plan import allocate
from convex_caldera.core.recipe import Recipe
from convex_caldera.errors import InfeasibleBudgetError
from convex_caldera.workflow.job import Job
from convex_caldera.workflow.operating_points import Menus
from convex_caldera.workflow.planning import Plan, planned_bytes

# Header bytes depend on the plan and the plan on what they leave; a few rounds settle both.
HEADER_ROUNDS = 8


@dataclass(frozen=True)
class Decision:
    """The plan as files, as labels with a bound, and the operating points it was chosen among."""

    plan: Plan
    integer: IntegerPlan
    curves: Curves


def decide(job: Job, menus: Menus, curves: Curves) -> Decision:
    """The best plan found whose file, headers included, is within the job's budget.

    Raises:
        InfeasibleBudgetError: the cheapest candidates and their headers take more.
    """
    shapes = {site.name: site.shape for site in job.sites}
    by_label = {name: {c.label: c.recipe for c in found} for name, found in menus.items()}
    budget, header = job.budget.compressed_bytes, 0
    # What is left beside the cheapest plan; plans of many formats have longer headers.
    room = budget - build_menus(curves).least_bits // 8
    for left in reversed(range(HEADER_ROUNDS)):
        integer = allocate(curves, 8 * (budget - header))
        recipes = _recipes(by_label, integer.choice)
        size = planned_bytes(recipes, shapes)
        needed = size - integer.bits // 8
        if needed <= header or header == room:
            break
        header = min(needed, room) if left > 1 else room
    if size > budget:
        raise InfeasibleBudgetError(
            f"{job.budget.wording}: {budget} bytes are below the least feasible {size}, "
            f"{needed} of them file headers",
            8 * size,
        )
    return Decision(Plan(recipes, shapes, size, job.budget), integer, curves)


def _recipes(
    by_label: Mapping[str, Mapping[str, Recipe]], choice: Mapping[str, str]
) -> dict[str, Recipe]:
    return {name: by_label[name][label] for name, label in choice.items()}
