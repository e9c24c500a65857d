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

__all__ = [
    "Curves",
    "Frontier",
    "Group",
    "Option",
    "Plan",
    "allocate",
    "curves_from_dict",
    "curves_to_dict",
    "frontier",
    "loads_curves",
    "read_curves",
    "write_curves",
]
