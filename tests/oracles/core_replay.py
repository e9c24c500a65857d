"""The core bound of docs/certificate.md section 3.1, replayed in exact rational arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

Menu = Sequence[tuple[int, Fraction]]  # stored bits, distortion


def no_plan_below(claim: Fraction, menus: Sequence[Menu], price: Fraction, budget: int) -> bool:
    """Whether every plan within the budget has at least the claimed distortion."""
    least = [min(d + price * w for w, d in menu) for menu in menus]
    gap = claim - (sum(least) - price * budget)
    options = [
        [(w, d + price * w - low) for w, d in menu] for menu, low in zip(menus, least, strict=True)
    ]
    options = [[(w, r) for w, r in menu if r < gap] for menu in options]
    if any(not menu for menu in options):
        return True
    options.sort(key=lambda menu: min(w for w, _ in menu) - max(w for w, _ in menu))
    plans: list[tuple[int, Fraction]] = [(0, Fraction(0))]
    for i, menu in enumerate(options):
        fewest = sum(min(w for w, _ in later) for later in options[i + 1 :])
        most = sum(max(w for w, _ in later) for later in options[i + 1 :])
        grown = sorted((w + dw, r + dr) for w, r in plans for dw, dr in menu)
        plans, best = [], None
        for w, r in grown:
            hopeless = r >= gap or w + fewest > budget or r + price * (budget - w - most) >= gap
            if not hopeless and (best is None or r - price * w < best):
                best = r - price * w
                plans.append((w, r))
    return all(r + price * (budget - w) >= gap for w, r in plans)
