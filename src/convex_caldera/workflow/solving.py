"""The allocation solver alone, from saved curves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convex_caldera.allocate.curves import read_curves
from convex_caldera.allocate.plan import Plan, allocate, frontier
from convex_caldera.errors import RecipeError
from convex_caldera.evaluate.table import plain_table


@dataclass(frozen=True)
class Solved:
    """A plan for one budget, the whole frontier, or both."""

    plan: Plan | None
    points: tuple[dict[str, Any], ...]

    def to_dict(self) -> dict[str, Any]:
        record = {} if self.plan is None else {**self.plan.to_dict(), "plan": self.plan.choice}
        return {**record, "frontier": list(self.points)} if self.points else record

    def text(self) -> str:
        blocks = []
        if self.plan is not None:
            plan = self.plan
            rows = [(name, label) for name, label in sorted(plan.choice.items())]
            blocks.append(plain_table(("layer", "option"), rows))
            blocks.append(
                f"{plan.bits} of {plan.budget_bits} bits ({plan.bits_per_weight:.4f} per weight), "
                f"distortion {plan.distortion:.6g}, bound {plan.bound:.6g}, "
                f"gap {100 * plan.plan_gap:.4f} %, price {plan.price:.6g} per bit"
            )
        if self.points:
            rows = [(f"{p['bits']}", f"{p['distortion']:.6g}") for p in self.points]
            blocks.append(plain_table(("bits", "distortion"), rows))
        return "\n\n".join(blocks)


def solve_curves(path: Path, budget: int | None, whole_frontier: bool) -> Solved:
    """Choose one option per group under a budget of total stored bits.

    Raises:
        DataError, RecipeError: malformed curves, or nothing asked for.
        InfeasibleBudgetError: no plan fits; names the least feasible budget.
    """
    if budget is None and not whole_frontier:
        raise RecipeError("give --budget BITS, --frontier, or both")
    curves = read_curves(path)
    plan = None if budget is None else allocate(curves, budget)
    points: tuple[dict[str, Any], ...] = ()
    if whole_frontier:
        points = tuple(frontier(curves).points())
    return Solved(plan, points)
