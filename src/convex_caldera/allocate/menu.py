"""Decisions to take: ties merged, pins applied, and the lower convex hull of every menu.

A tie is one decision: its members share a label, so its menu is the labels that all members
know, with bits and distortions added. Distortions are doubles, hence dyadic rationals; `Menus`
keeps them as integers over one common power of two, so that a bound can be exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from convex_caldera.allocate.curves import Curves, Group
from convex_caldera.errors import RecipeError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Menu:
    """One decision: the groups it decides for and, per label, total bits and distortion.

    Options are sorted by (bits, distortion, label). `exact` holds the distortions as integers
    over the denominator of `Menus`; `hull` indexes the lower convex hull from the cheapest
    option (least bits) to the best one (least distortion), slopes strictly decreasing.
    """

    members: tuple[str, ...]
    labels: tuple[str, ...]
    bits: tuple[int, ...]
    exact: tuple[int, ...]
    distortion: tuple[float, ...]
    hull: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.members[0]


@dataclass(frozen=True, eq=False)
class Menus:
    """All decisions in the order of their names; `denominator` is a power of two."""

    menus: tuple[Menu, ...]
    denominator: int

    @property
    def least_bits(self) -> int:
        """Bits of the cheapest plan, whatever it costs in distortion."""
        return sum(menu.bits[0] for menu in self.menus)

    def distortion(self, picks: list[int]) -> Fraction:
        """Exact distortion of the plan that takes option picks[i] of menu i."""
        total = sum(menu.exact[i] for menu, i in zip(self.menus, picks, strict=True))
        return Fraction(total, self.denominator)

    def bound(self, price: float, budget_bits: int) -> Fraction:
        """sum_g min_o [d + price w] - price B, exactly.

        For any price >= 0 no plan within the budget has less distortion: its Lagrangian
        sum d + price (sum w - B) is at most its distortion, and at least this.
        """
        numerator, divisor = float(price).as_integer_ratio()
        slope = numerator * self.denominator
        total = -slope * budget_bits
        for menu in self.menus:
            pairs = zip(menu.exact, menu.bits, strict=True)
            total += min(d * divisor + slope * w for d, w in pairs)
        return Fraction(total, self.denominator * divisor)


def build_menus(curves: Curves, pins: Mapping[str, str] | None = None) -> Menus:
    """Merge ties and apply pins (group name -> label; a pin binds the whole tie).

    Raises:
        RecipeError: a pin names an unknown group or label, two pins contradict each other
            within a tie, or the members of a tie have no label in common.
    """
    pins = dict(pins or {})
    by_name = {group.name: group for group in curves.groups}
    for name, label in pins.items():
        if name not in by_name:
            raise RecipeError(f"a pin names {name!r}, which is not a group")
        by_name[name].option(label)
    tied = {name for tie in curves.ties for name in tie}
    bundles = [tuple(sorted(tie)) for tie in curves.ties]
    bundles += [(group.name,) for group in curves.groups if group.name not in tied]
    denominator = max(
        o.distortion.as_integer_ratio()[1] for group in curves.groups for o in group.options
    )
    menus = [
        _merge([by_name[name] for name in bundle], pins, denominator) for bundle in sorted(bundles)
    ]
    return Menus(tuple(menus), denominator)


def lower_hull(bits: Sequence[float], distortion: Sequence[float]) -> list[int]:
    """Indices of the lower convex hull of points sorted by (bits, distortion).

    Only its descending part: from the first point to the first of least distortion. Slopes
    (distortion lost per bit) are strictly decreasing as computed in double precision.
    """
    hull: list[int] = []
    slopes: list[float] = []
    for i, (w, d) in enumerate(zip(bits, distortion, strict=True)):
        if hull and d >= distortion[hull[-1]]:
            continue
        while hull:
            width = w - bits[hull[-1]]
            slope = (distortion[hull[-1]] - d) / width if width else float("inf")
            if len(hull) > 1 and slope >= slopes[-1]:
                hull.pop()
                slopes.pop()
                continue
            slopes.append(slope)
            break
        hull.append(i)
    return hull


def _merge(groups: list[Group], pins: Mapping[str, str], denominator: int) -> Menu:
    members = tuple(group.name for group in groups)
    pinned = {pins[name] for name in members if name in pins}
    if len(pinned) > 1:
        raise RecipeError(f"{', '.join(members)} are tied but pinned to {sorted(pinned)}")
    shared = set.intersection(*({o.label for o in group.options} for group in groups))
    if not shared:
        raise RecipeError(f"{', '.join(members)} are tied but have no label in common")
    if pinned and not pinned <= shared:
        raise RecipeError(f"pin {pinned.pop()!r} is not offered by all of {', '.join(members)}")
    sums = dict.fromkeys(pinned or shared, (0, 0))
    for group in groups:
        for option in group.options:
            if option.label in sums:
                bits, exact = sums[option.label]
                numerator, divisor = option.distortion.as_integer_ratio()
                exact += numerator * (denominator // divisor)
                sums[option.label] = (bits + option.bits, exact)
    rows = sorted((bits, exact, label) for label, (bits, exact) in sums.items())
    widths = [row[0] for row in rows]
    distortion = [float(Fraction(row[1], denominator)) for row in rows]
    return Menu(
        members,
        tuple(row[2] for row in rows),
        tuple(widths),
        tuple(row[1] for row in rows),
        tuple(distortion),
        tuple(lower_hull(widths, distortion)),
    )
