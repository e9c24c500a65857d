"""Improve a feasible plan by single and double exchanges of options.

With the reduced cost r_o = d_o + price w_o - min over the menu, any plan satisfies

    distortion = bound + sum_g r_{o_g} + price (B - bits),

all terms on the right >= 0. So a plan better than one at distance `gap` = distortion - bound
uses only options with r_o < gap: the rest leave the problem for good, and what remains (the
*core*) is small even when the menus are large (Balas and Zemel 1980; Pisinger 1995).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from convex_caldera.allocate.menu import Floats, Ints, Menus

MOST_PAIRED = 1500  # core options up to which all pairs are looked at (18 MB of doubles)
ROUNDING_SLACK = 1e-9  # relative; reduced costs are doubles, so the core is cut a little wide


@dataclass(frozen=True, eq=False)
class Core:
    """Options that may still be in a better plan, flat over menus.

    owner, index: which menu and which of its options; bits, cost: the option's bits and reduced
    cost, both relative to the menu's option of reduced cost zero.
    """

    owner: Ints
    index: Ints
    bits: Ints
    cost: Floats

    def __len__(self) -> int:
        return len(self.owner)

    def below(self, gap: float) -> Core:
        """The options of reduced cost at most `gap`."""
        return self.take(self.cost <= gap * (1 + ROUNDING_SLACK))

    def undecided(self) -> Core:
        """Only the menus with more than one option left."""
        counts = np.bincount(self.owner)
        return self.take(counts[self.owner] > 1)

    def take(self, keep: NDArray[np.bool_] | Ints) -> Core:
        """The options marked, or listed."""
        return Core(self.owner[keep], self.index[keep], self.bits[keep], self.cost[keep])


def cheapest_at(menus: Menus, price: float) -> list[int]:
    """Per menu the option of least d + price w; ties go to the fewest bits, then the label."""
    return [
        int(np.argmin(np.array(menu.distortion) + price * np.array(menu.bits, dtype=np.float64)))
        for menu in menus.menus
    ]


def build_core(menus: Menus, price: float) -> Core:
    """All options with their reduced costs at a price, without the dominated ones."""
    parts = []
    for g, (menu, base) in enumerate(zip(menus.menus, cheapest_at(menus, price), strict=True)):
        distortion = np.array(menu.distortion)
        bits = np.array(menu.bits, dtype=np.int64) - menu.bits[base]
        # Differences first: d - d_base keeps the digits that d + price w would lose.
        cost = np.maximum((distortion - distortion[base]) + price * bits, 0.0)
        before = np.concatenate([[np.inf], np.minimum.accumulate(distortion)[:-1]])
        keep = distortion < before
        keep[base] = True
        index = np.flatnonzero(keep)
        parts.append((np.full(len(index), g), index, bits[index], cost[index]))
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    return Core(*columns)


def repair(menus: Menus, picks: list[int], budget_bits: int, core: Core) -> list[int]:
    """Exchange options one or two at a time while the plan improves; never above the budget.

    Best improvement first, ties by menu and option order, so the result is deterministic.
    Cost: O(core) per single exchange, O(core^2) per double one.
    """
    picks = list(picks)
    bits = np.concatenate([np.array(menu.bits, dtype=np.int64) for menu in menus.menus])
    loss = np.concatenate([np.array(menu.distortion) for menu in menus.menus])
    start = np.concatenate([[0], np.cumsum([len(menu.bits) for menu in menus.menus])])[:-1]
    flat = start[core.owner] + core.index
    while True:
        now = start + np.array(picks)
        room = budget_bits - int(bits[now].sum())
        wider = bits[flat] - bits[now][core.owner]
        gain = loss[now][core.owner] - loss[flat]
        moves = _best_single(wider, gain, room) or _best_pair(wider, gain, core.owner, room)
        if not moves:
            return picks
        for move in moves:
            picks[int(core.owner[move])] = int(core.index[move])


def _best_single(wider: Ints, gain: Floats, room: int) -> tuple[int, ...]:
    value = np.where(wider <= room, gain, 0.0)
    best = int(np.argmax(value)) if len(value) else 0
    return (best,) if len(value) and value[best] > 0 else ()


def _best_pair(wider: Ints, gain: Floats, owner: Ints, room: int) -> tuple[int, ...]:
    if not 0 < len(owner) <= MOST_PAIRED:
        return ()
    fits = (wider[:, None] + wider[None, :] <= room) & (owner[:, None] != owner[None, :])
    value = np.where(fits, gain[:, None] + gain[None, :], 0.0)
    # A gain below the rounding of its own terms would let the search cycle.
    noise = 4 * np.finfo(float).eps * np.abs(gain).max()
    first, second = np.unravel_index(int(np.argmax(value)), value.shape)
    return (int(first), int(second)) if value[first, second] > noise else ()
