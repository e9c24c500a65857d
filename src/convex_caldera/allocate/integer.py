"""HiGHS on the core of the problem, for cores too large to be searched completely.

The core (repair.py) is all that a better plan can be made of. Its integer program is scaled so
that HiGHS works near 1: the objective is reduced cost over the present gap, the budget row is
divided by its largest entry. Whatever HiGHS returns is recomputed in integers by the caller; a
plan above the budget is refused here, never repaired in silence.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from convex_caldera.allocate.menu import Menus
from convex_caldera.allocate.repair import Core, cheapest_at


@dataclass(frozen=True)
class Integer:
    """What HiGHS said: its picks (None if it has none within the budget), status and bound.

    `bound_share` is HiGHS's own lower bound as a fraction of the gap it was given (0 is the price
    bound, 1 the plan it started from); it holds within floating-point tolerances only.
    """

    picks: list[int] | None
    status: str
    bound_share: float | None
    proved: bool


def solve_core(
    menus: Menus, core: Core, price: float, budget_bits: int, gap: float, seconds: float
) -> Integer:
    """Minimise sum of reduced costs + price x unused bits over the core within the budget.

    Args:
        core: options below the gap, from `build_core(menus, price).below(gap)`.
        gap: distortion of the best known plan minus the price bound, > 0.
        seconds: limit handed to HiGHS.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    base = cheapest_at(menus, price)
    room = budget_bits - sum(menu.bits[i] for menu, i in zip(menus.menus, base, strict=True))
    free = core.undecided()
    owners, row = np.unique(free.owner, return_inverse=True)
    size = len(free)
    if size == 0:
        return Integer(None, "one option left per group", None, True)
    # d = bound + cost + price (room - bits): the unused bits are part of what is minimised.
    value = (free.cost - price * free.bits) / gap
    largest = float(max(np.abs(free.bits).max(), abs(room), 1))
    one_each = csr_array((np.ones(size), (row, np.arange(size))), shape=(len(owners), size))
    result = milp(
        value,
        integrality=np.ones(size),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(free.bits[None, :] / largest, -np.inf, room / largest),
        ],
        options={"time_limit": seconds, "mip_rel_gap": 0.0},
    )
    picks = None
    if result.x is not None:
        picks = list(base)
        for k in np.flatnonzero(result.x > 0.5):
            picks[int(free.owner[k])] = int(free.index[k])
        if sum(menu.bits[i] for menu, i in zip(menus.menus, picks, strict=True)) > budget_bits:
            picks = None
    dual = getattr(result, "mip_dual_bound", None)
    share = None if dual is None else float(dual) + price * room / gap
    return Integer(picks, str(result.message), share, bool(result.status == 0))
