"""Loss versus rank: what the low-rank part buys, one series per kind of matrix or per setting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from convex_caldera.report.plots.canvas import (
    axis_label,
    label,
    legend_below,
    log_scale,
    looks,
    new_figure,
    style,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_TICKS = 8  # ranks; beyond, the axis numbers itself


def draw_loss_rank(
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    quantity: str = "relative loss, tr(E H Eᵀ) / tr(W H Wᵀ)",
    joined: bool = False,
    log_rank: bool = False,
) -> Figure:
    """Points (rank, loss) by series.

    Args:
        series: name -> points.
        quantity: label of the vertical axis, logarithmic if all losses are positive.
        joined: connect the points of a series in the order of their ranks; otherwise every
            series stands a little aside, so that equal ranks do not cover each other.
        log_rank: logarithmic horizontal axis, if no rank is 0.
    """
    with style():
        figure, axes = new_figure()
        for number, (name, look) in enumerate(looks(series).items()):
            points = sorted(series[name])
            aside = 0.0 if joined else _aside(number, series)
            line = look["linestyle"] if joined else "none"
            ranks = [rank + aside for rank, _ in points]
            losses = [loss for _, loss in points]
            size = {"linestyle": line, "markersize": 5 if joined else 3.5}
            axes.plot(ranks, losses, label=label(name), **{**look, **size})
        everything = [point for points in series.values() for point in points]
        log_scale(axes, "y", [loss for _, loss in everything])
        if log_rank:
            log_scale(axes, "x", [rank for rank, _ in everything])
        elif len(ranks_met := sorted({rank for rank, _ in everything})) <= MOST_TICKS:
            axes.set_xticks(ranks_met, [f"{rank:g}" for rank in ranks_met])
        axes.set_xlabel("rank of the low-rank part")
        axes.set_ylabel(axis_label(quantity))
        legend_below(axes, columns=4)
    return figure


def _aside(number: int, series: Mapping[str, Sequence[tuple[float, float]]]) -> float:
    """Shift of one series: all of them share 60 % of the narrowest step between ranks."""
    ranks = sorted({rank for points in series.values() for rank, _ in points})
    step = min((b - a for a, b in pairwise(ranks)), default=1.0)
    return 0.6 * step * ((number + 0.5) / len(series) - 0.5)
