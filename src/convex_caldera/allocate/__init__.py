"""From measured curves and a budget to a plan with a certificate."""

from convex_caldera.allocate.curves import (
    Curves,
    Group,
    Option,
    curves_from_dict,
    curves_to_dict,
    loads_curves,
    read_curves,
    write_curves,
)
from convex_caldera.allocate.frontier import Frontier
from convex_caldera.allocate.plan import Plan, allocate, frontier
from convex_caldera.allocate.surrogate import Allocation, RateModel, fit_decay, solve_surrogate

__all__ = [
    "Allocation",
    "Curves",
    "Frontier",
    "Group",
    "Option",
    "Plan",
    "RateModel",
    "allocate",
    "curves_from_dict",
    "curves_to_dict",
    "fit_decay",
    "frontier",
    "loads_curves",
    "read_curves",
    "solve_surrogate",
    "write_curves",
]
