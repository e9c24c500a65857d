"""The whole bits-versus-loss frontier, from one sort of all hull segments.

Every menu starts at its cheapest hull point; walking along its hull buys distortion at falling
slopes. Taking all segments of all menus in the order of their slopes visits exactly the plans
that are optimal for some price: the lower convex hull of all plans (Shoham and Gersho, 1988).
The slope of the segment at which a budget runs out is the best price for that budget.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from convex_caldera.allocate.menu import Floats, Ints, Menus


@dataclass(frozen=True, eq=False)
class Frontier:
    """Hull points in order of bits; point i is an optimal plan for a budget of `bits[i]`.

    Attributes:
        bits: (points,) total stored bits, int64, increasing.
        distortions: (points,) total distortion, float64, decreasing.
        prices: (points,) slope of the segment that follows, distortion per bit; 0 at the end.
    """

    menus: Menus
    bits: Ints
    distortions: Floats
    prices: Floats
    _menu_of_segment: Ints

    def __len__(self) -> int:
        return len(self.bits)

    def last_within(self, budget_bits: int) -> int:
        """The point of most bits within the budget; -1 if even the first is above it."""
        return int(np.searchsorted(self.bits, budget_bits, side="right")) - 1

    def picks(self, point: int) -> list[int]:
        """Option index per menu at a point."""
        taken = np.bincount(self._menu_of_segment[:point], minlength=len(self.menus.menus))
        return [menu.hull[k] for menu, k in zip(self.menus.menus, taken, strict=True)]

    def choice(self, point: int) -> dict[str, str]:
        """Group name -> label at a point."""
        return choice_of(self.menus, self.picks(point))

    def best_price(self, budget_bits: int) -> float:
        """A price that maximises the bound at this budget: the linear relaxation's dual.

        Where a point meets the budget exactly every price between its two slopes is optimal;
        their middle keeps the bound clear of rounding.
        """
        point = self.last_within(budget_bits)
        after = float(self.prices[point])
        if self.bits[point] == budget_bits and point > 0 and after > 0:
            return 0.5 * (float(self.prices[point - 1]) + after)
        return after

    def points(self) -> list[dict[str, float]]:
        """The curve as JSON-able rows (bits, distortion, price), without the choices."""
        rows = zip(self.bits.tolist(), self.distortions.tolist(), self.prices.tolist(), strict=True)
        return [{"bits": b, "distortion": d, "price": p} for b, d, p in rows]


def build_frontier(menus: Menus) -> Frontier:
    """Sort all hull segments by slope; equal slopes by menu name. O(segments log segments)."""
    owner, width, gain = [], [], []
    for g, menu in enumerate(menus.menus):
        for i, j in pairwise(menu.hull):
            owner.append(g)
            width.append(menu.bits[j] - menu.bits[i])
            gain.append(menu.distortion[i] - menu.distortion[j])
    owners = np.array(owner, dtype=np.int64)
    widths = np.array(width, dtype=np.int64)
    gains = np.array(gain, dtype=np.float64)
    slopes = gains / np.maximum(widths, 1)
    order = np.lexsort((np.arange(len(slopes)), owners, -slopes))
    base = sum(menu.bits[menu.hull[0]] for menu in menus.menus)
    best = sum(menu.distortion[menu.hull[-1]] for menu in menus.menus)
    # Summed from the small end, so that the last points keep their relative accuracy.
    above = np.concatenate([np.cumsum(gains[order][::-1])[::-1], [0.0]])
    return Frontier(
        menus,
        base + np.concatenate([[0], np.cumsum(widths[order])]).astype(np.int64),
        best + above,
        np.concatenate([slopes[order], [0.0]]),
        owners[order],
    )


def choice_of(menus: Menus, picks: list[int]) -> dict[str, str]:
    """Group name -> label, in the order of names."""
    pairs = [
        (name, menu.labels[i])
        for menu, i in zip(menus.menus, picks, strict=True)
        for name in menu.members
    ]
    return dict(sorted(pairs))
