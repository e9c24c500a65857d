"""Search the core of a plan completely: what is left when options that cannot help are gone.

With reduced costs r = d + nu w - min and gap = distortion of the best known plan - price bound,
a better plan satisfies  sum r + nu (B - bits) < gap  (repair.py). So partial plans are grown one
menu at a time and dropped when

    their reduced costs reach the gap,
    the remaining menus cannot bring the bits within the budget, or close enough to it, or
    another partial plan has no more bits and no more distortion  (d = r - nu w).

What survives to the end is every plan worth looking at; usually a few hundred partial plans at
most, so this is faster than branch and bound, and it is a proof that anyone can replay.

Reduced costs are held as integers: floor(r units / gap), computed from exact rationals, with
`units` a power of two. Floors only make dropping harder, except that two plans may be told apart
wrongly by as many units as there are menus; the proved bound is lower by twice that.

Source: dynamic programming with bounds (Dyer, Riha and Walker 1995; Pisinger, EJOR 83, 1995).
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from convex_caldera.allocate.menu import Ints, Menus
from convex_caldera.allocate.repair import Core, cheapest_at

MOST_STATES = 1_000_000  # partial plans at one time; beyond, the search gives up and says so
LOOKED_AT = (Fraction(1, 64), Fraction(1, 16), Fraction(1, 4), Fraction(1))  # shares of the gap
MOST_UNITS = 2**44
HEADROOM = 2**61  # units times bits must stay below this in int64
NEAR_BEST = 256  # complete plans evaluated exactly at the end


@dataclass(frozen=True)
class Searched:
    """A plan better than the one given (None if there is none), and what was proved.

    `bound`: no plan within the budget has less distortion (None if the search gave up).
    """

    picks: list[int] | None
    bound: Fraction | None


@dataclass(frozen=True, eq=False)
class _Level:
    """One undecided menu: its options' bits and unit costs, and how to walk back."""

    owner: int
    index: Ints
    bits: Ints
    cost: Ints
    parent: Ints
    taken: Ints


def search_core(
    menus: Menus, core: Core, price: float, budget_bits: int, value: Fraction
) -> Searched:
    """The best plan within the budget, and a bound that meets it to about 1e-15.

    Looks below a fraction of the gap first and widens: the cost grows with what is looked at,
    and repaired plans are often ten times further from the bound than the best one.

    Args:
        core: all options with their reduced costs at `price`.
        value: exact distortion of the best known plan, above the price bound.
    """
    bound = menus.bound(price, budget_bits)
    for share in LOOKED_AT:
        limit = bound + share * (value - bound)
        found = _search_below(menus, core.below(float(limit - bound)), price, budget_bits, limit)
        if found.picks is not None or found.bound is None:
            return found
    return found


def _search_below(
    menus: Menus, core: Core, price: float, budget_bits: int, limit: Fraction
) -> Searched:
    """The best of all plans of distortion below `limit`, if there is one."""
    base = cheapest_at(menus, price)
    gap = limit - menus.bound(price, budget_bits)
    free = core.undecided()
    room = budget_bits - sum(menu.bits[i] for menu, i in zip(menus.menus, base, strict=True))
    nu = Fraction(price)
    units = _units(free, nu, gap, room)
    levels = _levels(menus, free, base, nu, units / gap)
    high, low = _ceil(nu * units / gap), int(nu * units / gap)
    states = _grow(levels, room, units, low, high)
    if states is None:
        return Searched(None, None)
    grown, bits, cost = states
    order = np.argsort(cost + low * (room - bits), kind="stable")[:NEAR_BEST]
    found = [_walk_back(grown, int(state), base) for state in order]
    better = [picks for picks in found if menus.distortion(picks) < limit]
    best = min(better, key=menus.distortion) if better else None
    least = limit if best is None else menus.distortion(best)
    return Searched(best, least - 2 * (len(menus.menus) + 1) * gap / units)


def _units(free: Core, nu: Fraction, gap: Fraction, room: int) -> int:
    """The largest power of two for which costs and nu times bits fit into int64."""
    reach = abs(room) + 1
    if len(free):
        widest = np.zeros(int(free.owner.max()) + 1, dtype=np.int64)
        np.maximum.at(widest, free.owner, np.abs(free.bits))
        reach += int(widest.sum())
    units = MOST_UNITS
    while units > 1 and (nu * units / gap + 1) * reach > HEADROOM:
        units //= 2
    return units


def _levels(
    menus: Menus, free: Core, base: list[int], nu: Fraction, per_cost: Fraction
) -> list[_Level]:
    """Undecided menus, widest first, with exact reduced costs in units, rounded down."""
    nothing = np.zeros(0, dtype=np.int64)
    levels = []
    for g in np.unique(free.owner):
        menu, index = menus.menus[g], free.index[free.owner == g]
        exact = [
            Fraction(d, menus.denominator) + nu * w
            for d, w in zip(menu.exact, menu.bits, strict=True)
        ]
        least = min(exact)
        cost = [int((exact[i] - least) * per_cost) for i in index]
        bits = [menu.bits[i] - menu.bits[base[g]] for i in index]
        levels.append(
            _Level(int(g), index, np.array(bits), np.array(cost, dtype=np.int64), nothing, nothing)
        )
    return sorted(levels, key=lambda level: (-int(np.ptp(level.bits)), level.owner))


def _grow(
    levels: list[_Level], room: int, units: int, low: int, high: int
) -> tuple[list[_Level], Ints, Ints] | None:
    """All surviving complete plans (bits, cost) with their way back; None if too many."""
    least = np.cumsum([0, *(int(level.bits.min()) for level in reversed(levels))])[::-1]
    most = np.cumsum([0, *(int(level.bits.max()) for level in reversed(levels))])[::-1]
    bits, cost = np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64)
    grown = []
    for i, level in enumerate(levels):
        if len(bits) * len(level.bits) > MOST_STATES:
            return None
        wide = (bits[:, None] + level.bits).ravel()
        dear = (cost[:, None] + level.cost).ravel()
        unused = np.maximum(room - wide - most[i + 1], 0)
        alive = np.flatnonzero((wide + least[i + 1] <= room) & (dear + low * unused < units))
        alive = alive[np.lexsort((dear[alive], wide[alive]))]
        # In order of bits, a plan stays only if its distortion is less than all before it.
        loss = dear[alive] - high * wide[alive]
        before = np.minimum.accumulate(np.concatenate([[np.iinfo(np.int64).max], loss[:-1]]))
        alive = alive[loss < before[: len(loss)]]
        bits, cost = wide[alive], dear[alive]
        parent, taken = np.divmod(alive, len(level.bits))
        grown.append(_Level(level.owner, level.index, level.bits, level.cost, parent, taken))
    return grown, bits, cost


def _walk_back(grown: list[_Level], state: int, base: list[int]) -> list[int]:
    picks = list(base)
    for level in reversed(grown):
        picks[level.owner] = int(level.index[level.taken[state]])
        state = int(level.parent[state])
    return picks


def _ceil(value: Fraction) -> int:
    return -((-value.numerator) // value.denominator)
