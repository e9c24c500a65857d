"""Where the bytes went: stacked bars, one per model or kind of matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from convex_caldera.report.plots.canvas import (
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    VERMILLION,
    axis_label,
    label,
    legend_below,
    new_figure,
    style,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROW_INCHES = 0.38
# Neighbours differ in lightness and in hatching, so that a grey print can be read.
LOOKS = (
    (BLUE, ""),
    (ORANGE, "///"),
    (GREEN, ""),
    (PURPLE, "..."),
    (VERMILLION, "\\\\\\"),
    ("#D9D9D9", ""),
)


def draw_byte_bars(
    bars: Mapping[str, Mapping[str, float]], parts: Sequence[str], *, quantity: str
) -> Figure:
    """Horizontal bars in the order given, cut into `parts` from left to right.

    Args:
        bars: name -> part -> amount.
        parts: every part, in order; those absent everywhere are left out.
        quantity: label of the horizontal axis, with its unit.
    """
    with style():
        figure, axes = new_figure(height=1.15 + ROW_INCHES * max(2, len(bars)))
        names = list(bars)
        left = [0.0] * len(names)
        for part, (colour, hatch) in zip(parts, LOOKS, strict=False):
            amounts = [float(bars[name].get(part, 0.0)) for name in names]
            if any(amounts):
                axes.barh(
                    range(len(names)),
                    amounts,
                    left=left,
                    height=0.7,
                    color=colour,
                    hatch=hatch,
                    edgecolor="white",
                    linewidth=0.4,
                    label=part,
                )
                left = [a + b for a, b in zip(left, amounts, strict=True)]
        for i, total in enumerate(left):
            axes.annotate(
                f"{total:,.0f}" if total >= 100 else f"{total:.2f}",
                (total, i),
                xytext=(3, 0),
                textcoords="offset points",
                va="center",
                fontsize=8.5,
            )
        axes.set_yticks(range(len(names)), [label(name, 32) for name in names])
        axes.tick_params(axis="y", length=0)
        axes.grid(False, axis="y")
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_xlim(left=0)
        axes.set_xlabel(axis_label(quantity))
        legend_below(axes, columns=3)
    return figure
