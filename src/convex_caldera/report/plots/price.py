"""The frontier of all plans over bits, and the price of a bit along it.

The frontier is the lower convex hull of everything the measured options allow. Its slope is the
price, the dual value of the budget: what one more bit would buy. A plan lies on or above it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from convex_caldera.report.plots.canvas import (
    BLUE,
    GREY,
    VERMILLION,
    axis_label,
    log_scale,
    new_figure,
    style,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_price(
    bits: Sequence[float],
    distortion: Sequence[float],
    price: Sequence[float],
    *,
    plan: tuple[float, float, float] | None = None,
    budget: float | None = None,
    unit: str = "distortion",
) -> Figure:
    """Two panels over bits per weight: distortion of the frontier, and its price.

    Args:
        bits: bits per weight of the frontier's points, increasing.
        distortion: theirs.
        price: distortion per bit per weight from each point to the next; 0 at the last.
        plan: bits per weight, distortion and price of the plan that was chosen.
        budget: bits per weight that were allowed.
        unit: of the distortion.
    """
    with style():
        figure, (upper, lower) = new_figure(2, 1, height=4.8, sharex=True)
        upper.plot(bits, distortion, color=BLUE, marker=".", markersize=3, label="frontier")
        lower.step(bits[:-1], price[:-1], where="post", color=BLUE, label="price on the frontier")
        log_scale(upper, "y", distortion)
        log_scale(lower, "y", price[:-1])
        if budget is not None:
            for panel in (upper, lower):
                panel.axvline(budget, color=GREY, linewidth=1, linestyle="--")
            upper.annotate(
                " budget",
                (budget, 0.98),
                xycoords=("data", "axes fraction"),
                va="top",
                fontsize=8.5,
                color=GREY,
            )
        if plan is not None:
            mark = {"color": VERMILLION, "marker": "D", "linestyle": "none", "markersize": 6.5}
            upper.plot([plan[0]], [plan[1]], label="this plan", zorder=5, **mark)
            lower.plot([plan[0]], [plan[2]], label="price of its bound", zorder=5, **mark)
        upper.set_ylabel(axis_label(f"predicted loss\n({unit})"))
        lower.set_ylabel(axis_label(f"price of a bit per weight\n({unit})"))
        lower.set_xlabel("stored bits per compressed weight")
        upper.legend()
        lower.legend()
    return figure
