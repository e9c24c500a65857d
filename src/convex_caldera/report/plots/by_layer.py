"""One number per layer over the depth of the model: gap to the limit, relative loss, and so on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

MOST_JOINED = 12  # blocks; beyond, lines would cover the points


def draw_by_layer(
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    quantity: str,
    log: bool = False,
    limit: tuple[float, str] | None = None,
) -> Figure:
    """Points (block, value) by kind of matrix.

    Args:
        series: kind -> points.
        quantity: label of the vertical axis, with its unit.
        log: logarithmic vertical axis, if all values are positive.
        limit: a horizontal line and what it is.
    """
    with style():
        figure, axes = new_figure()
        everything = [point for points in series.values() for point in points]
        blocks = {block for block, _ in everything}
        for name, look in looks(series).items():
            points = sorted(series[name])
            x, y = zip(*points, strict=True) if points else ((), ())
            if len(blocks) > MOST_JOINED:
                look = {**look, "linestyle": "none", "markersize": 3.5}
            axes.plot(x, y, label=label(name, 28), linewidth=0.9, **look)
        if log:
            ends = [] if limit is None else [limit[0]]
            log_scale(axes, "y", [value for _, value in everything] + ends)
        if limit is not None:
            axes.axhline(limit[0], color="black", linewidth=1)
            axes.annotate(
                limit[1],
                (0, limit[0]),
                xycoords=("axes fraction", "data"),
                xytext=(3, 3),
                textcoords="offset points",
                fontsize=8.5,
            )
        if len(blocks) <= 20:
            axes.set_xticks(sorted(blocks))
        axes.set_xlabel("block")
        axes.set_ylabel(axis_label(quantity))
        axes.margins(x=0.05, y=0.1)
        legend_below(axes, columns=4)
    return figure
