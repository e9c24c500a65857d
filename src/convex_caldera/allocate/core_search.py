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

import math
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

from convex_caldera.allocate.menu import Ints, Menus
from convex_caldera.allocate.repair import Core

MOST_STATES = 1_000_000  # partial plans at one time; beyond, the search gives up and says so
PROVED_AT = 5  # of the following, the last ones are tried by the complete search
BEAM = 1000  # partial plans kept by the narrow search
LOOKED_AT = tuple(Fraction(1, 2**n) for n in range(8, -1, -1))  # shares of the gap, widening
MOST_UNITS = 2**44
HEADROOM = 2**61  # units times bits must stay below this in int64
NEAR_BEST = 64  # complete plans evaluated exactly at the end


@dataclass(frozen=True)
class Searched:
    """A plan better than the one given (None if there is none), and what was proved.

    `bound`: no plan within the budget has less distortion (None if the search gave up).
    """

    picks: list[int] | None
    bound: Fraction | None


@dataclass(frozen=True, eq=False)
class Search:
    """The core of one problem with exact reduced costs, ready to be searched below any limit.

    reduced: per core option, its reduced cost as an integer over `denominator`; base: per menu
    the option that the bits of the core are relative to; room: budget minus the bits of those.
    """

    menus: Menus
    core: Core
    reduced: tuple[int, ...]
    denominator: int
    base: tuple[int, ...]
    room: int
    price: Fraction
    bound: Fraction

    def best_below(self, value: Fraction) -> Searched:
        """The best of all plans of distortion below `value`, and a bound for all plans.

        The cost grows with the distance that is searched, so it is widened step by step.
        """
        for share in LOOKED_AT[-PROVED_AT:]:
            found = self._search(self.bound + share * (value - self.bound), None)
            if found.picks is not None or found.bound is None:
                break
        return found

    def repair(self, picks: list[int]) -> list[int]:
        """A better plan, if keeping only the cheapest partial plans finds one.

        Looks close to the bound first and widens, because a narrow search goes astray where
        there is much to choose from.
        """
        value = self.menus.distortion(picks)
        for share in LOOKED_AT:
            found = self._search(self.bound + share * (value - self.bound), BEAM).picks
            if found is not None:
                return found
        return picks

    def _search(self, limit: Fraction, beam: int | None) -> Searched:
        gap = limit - self.bound
        if gap <= 0:
            return Searched(None, None)
        free, reduced = self._below(gap)
        units = self._units(free, gap)
        levels = self._levels(free, reduced, units / gap)
        per_bit = self.price * units / gap
        low, high = math.floor(per_bit), math.ceil(per_bit)
        states = _grow(levels, self.room, units, low, high, beam)
        if states is None:
            return Searched(None, None)
        grown, bits, cost = states
        order = np.argsort(cost + low * (self.room - bits), kind="stable")[:NEAR_BEST]
        found = [_walk_back(grown, int(state), self.base) for state in order]
        better = [picks for picks in found if self.menus.distortion(picks) < limit]
        best = min(better, key=self.menus.distortion) if better else None
        least = limit if best is None else self.menus.distortion(best)
        bound = least - 2 * (len(self.menus.menus) + 1) * gap / units
        return Searched(best, bound if beam is None else None)

    def _below(self, gap: Fraction) -> tuple[Core, list[int]]:
        """Options of menus in which more than one has a reduced cost below the gap."""
        limit = gap * self.denominator
        keep = np.array([cost < limit for cost in self.reduced])
        several = np.bincount(self.core.owner[keep], minlength=len(self.menus.menus)) > 1
        keep &= several[self.core.owner]
        chosen = [cost for cost, kept in zip(self.reduced, keep, strict=True) if kept]
        return self.core.take(keep), chosen

    def _units(self, free: Core, gap: Fraction) -> int:
        """The largest power of two for which costs and prices of bits fit into int64."""
        widest = np.zeros(len(self.menus.menus), dtype=np.int64)
        np.maximum.at(widest, free.owner, np.abs(free.bits))
        reach = abs(self.room) + int(widest.sum()) + 1
        units = MOST_UNITS
        while units > 1 and (self.price * units / gap + 1) * reach > HEADROOM:
            units //= 2
        return units

    def _levels(self, free: Core, reduced: list[int], per_cost: Fraction) -> list[_Level]:
        """Undecided menus, widest first, with reduced costs in units, rounded down."""
        up, down = per_cost.numerator, per_cost.denominator * self.denominator
        cost = np.array([r * up // down for r in reduced], dtype=np.int64)
        levels = []
        for g in np.unique(free.owner):
            own = free.owner == g
            levels.append(_Level(int(g), free.index[own], free.bits[own], cost[own]))
        return sorted(levels, key=lambda level: (-int(np.ptp(level.bits)), level.owner))


def prepare_search(
    menus: Menus, core: Core, price: float, budget_bits: int, value: Fraction
) -> Search:
    """Exact reduced costs of the core options that can be in a plan of distortion below `value`.

    Args:
        core: all options that are not dominated, from `build_core(menus, price)`.
        value: distortion of a known plan within the budget.
    """
    numerator, divisor = float(price).as_integer_ratio()
    slope = numerator * menus.denominator
    costs = [
        [d * divisor + slope * w for d, w in zip(menu.exact, menu.bits, strict=True)]
        for menu in menus.menus
    ]
    base = tuple(row.index(min(row)) for row in costs)
    bound = menus.bound(price, budget_bits)
    denominator = menus.denominator * divisor
    limit = (value - bound) * denominator
    kept = []
    for k, (g, i) in enumerate(zip(core.owner.tolist(), core.index.tolist(), strict=True)):
        reduced = costs[g][i] - costs[g][base[g]]
        if reduced < limit:
            menu = menus.menus[g]
            kept.append((k, menu.bits[i] - menu.bits[base[g]], reduced))
    room = budget_bits - sum(menu.bits[i] for menu, i in zip(menus.menus, base, strict=True))
    taken = core.take(np.array([k for k, _, _ in kept], dtype=np.int64))
    exact = replace(taken, bits=np.array([bits for _, bits, _ in kept], dtype=np.int64))
    reduced_costs = tuple(reduced for _, _, reduced in kept)
    return Search(menus, exact, reduced_costs, denominator, base, room, Fraction(price), bound)


@dataclass(frozen=True, eq=False)
class _Level:
    """One undecided menu: its options' bits and unit costs."""

    owner: int
    index: Ints
    bits: Ints
    cost: Ints


@dataclass(frozen=True, eq=False)
class _Grown:
    """A level with, per surviving partial plan, the plan it grew from and the option taken."""

    level: _Level
    parent: Ints
    taken: Ints


def _grow(
    levels: list[_Level], room: int, units: int, low: int, high: int, beam: int | None
) -> tuple[list[_Grown], Ints, Ints] | None:
    """All surviving complete plans (bits, cost) with their way back; None if too many.

    With a beam about that many live on, half the cheapest and half spread over all bits.
    """
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
        if beam is not None and len(alive) > beam:
            cheap = alive[np.argsort(dear[alive], kind="stable")[: beam // 2]]
            alive = np.unique(np.concatenate([cheap, alive[:: 2 * len(alive) // beam]]))
            alive = alive[np.argsort(wide[alive], kind="stable")]
        bits, cost = wide[alive], dear[alive]
        grown.append(_Grown(level, *np.divmod(alive, len(level.bits))))
    within = bits <= room  # false only where nothing was undecided
    return grown, bits[within], cost[within]


def _walk_back(grown: list[_Grown], state: int, base: tuple[int, ...]) -> list[int]:
    picks = list(base)
    for step in reversed(grown):
        picks[step.level.owner] = int(step.level.index[step.taken[state]])
        state = int(step.parent[state])
    return picks
