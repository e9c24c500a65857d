"""Replay of a bound by complete search: that no plan within the budget is below a claimed value.

With r_u(o) = d_u(o) + nu w_u(o) - min over the menu >= 0, every plan within the budget B has

    distortion = price bound + sum_u r_u + nu (B - bits),     all terms >= 0.

A plan below the claim therefore has sum r + nu (B - bits) < gap = claim - price bound. Partial
plans (bits, r) are grown one decision at a time and dropped when r reaches the gap, when the
decisions to come cannot bring the bits within the budget or close enough to it, or when another
one has no more bits and no more r - nu bits. The claim holds if none is left below the gap.

All numbers are integers over one common power of two, so this is exact.
Source: docs/certificate.md, section 3.1; Dyer, Riha and Walker 1995; Pisinger, EJOR 83 (1995).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from convex_caldera.errors import CheckError

Row = tuple[int, Fraction]  # bits, distortion
MOST_PLANS = 2_000_000  # partial plans looked at per decision before the checker gives up


def no_plan_below(
    claim: Fraction, menus: Sequence[Sequence[Row]], price: Fraction, budget: int
) -> bool:
    """Whether every plan within the budget has at least the claimed distortion.

    Raises CheckError if the search grows beyond MOST_PLANS: the claim is then not replayed.
    """
    unit = math.lcm(
        claim.denominator, price.denominator, *(d.denominator for menu in menus for _, d in menu)
    )
    nu = int(price * unit)
    costs = [[(w, int(d * unit) + nu * w) for w, d in menu] for menu in menus]
    least = [min(cost for _, cost in menu) for menu in costs]
    gap = int(claim * unit) - sum(least) + nu * budget
    levels = [
        [(w, cost - low) for w, cost in menu if cost - low < gap]
        for menu, low in zip(costs, least, strict=True)
    ]
    if not all(levels):
        return True  # the gap is not even positive
    # Wide menus first: what is still to come is then soon too narrow to matter.
    levels.sort(key=lambda level: min(w for w, _ in level) - max(w for w, _ in level))
    fewest, most = _to_come(levels)
    plans = [(0, 0)]
    for i, level in enumerate(levels):
        if len(plans) * len(level) > MOST_PLANS:
            raise CheckError(f"the core bound is not replayed: {len(plans)} partial plans")
        grown = sorted((w + dw, r + dr) for w, r in plans for dw, dr in level)
        plans = _kept(grown, nu, gap, budget - fewest[i], budget - most[i])
    return all(r + nu * (budget - w) >= gap for w, r in plans)


def _to_come(levels: Sequence[Sequence[tuple[int, int]]]) -> tuple[list[int], list[int]]:
    """Fewest and most bits of all decisions after each."""
    fewest, most = [0], [0]
    for level in reversed(levels[1:]):
        fewest.append(fewest[-1] + min(w for w, _ in level))
        most.append(most[-1] + max(w for w, _ in level))
    return fewest[::-1], most[::-1]


def _kept(
    grown: list[tuple[int, int]], nu: int, gap: int, room: int, unused_from: int
) -> list[tuple[int, int]]:
    """Partial plans, sorted by bits, that may still become a plan below the claim."""
    kept, best = [], None
    for w, r in grown:
        if r >= gap or w > room or r + nu * (unused_from - w) >= gap:
            continue
        if best is None or r - nu * w < best:
            best = r - nu * w
            kept.append((w, r))
    return kept
