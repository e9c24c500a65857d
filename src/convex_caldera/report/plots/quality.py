"""Quality versus bits: one line per method, the original as a horizontal line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from convex_caldera.report.plots.canvas import (
    BLACK,
    GREY,
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


@dataclass(frozen=True)
class Quality:
    """One compressed model: its method, its size, a figure of merit and its standard error."""

    method: str
    bits: float
    value: float
    stderr: float | None = None


def draw_quality(
    points: Sequence[Quality],
    *,
    quantity: str,
    original: float | None = None,
    log: bool = False,
    bits_label: str = "stored bits per compressed weight",
) -> Figure:
    """Points of a method are joined in the order of their bits; bars are one standard error.

    Args:
        points: any order, several per method.
        quantity: label of the vertical axis, with its unit.
        original: value of the model that was not compressed.
        log: logarithmic vertical axis, if all values are positive.
        bits_label: of the horizontal axis.
    """
    methods = sorted({point.method for point in points}, key=lambda m: (m != "convex-caldera", m))
    with style():
        figure, axes = new_figure()
        for method, look in looks(methods).items():
            own = sorted((p for p in points if p.method == method), key=lambda p: p.bits)
            axes.errorbar(
                [p.bits for p in own],
                [p.value for p in own],
                yerr=[p.stderr or 0.0 for p in own] if any(p.stderr for p in own) else None,
                label=label(method),
                capsize=2.5,
                elinewidth=0.8,
                **look,
            )
        if original is not None:
            axes.axhline(original, color=BLACK, linewidth=1, linestyle=(0, (1, 2)))
            axes.annotate(
                "original",
                (0, original),
                xycoords=("axes fraction", "data"),
                xytext=(4, 3),
                textcoords="offset points",
                fontsize=8.5,
                color=GREY,
            )
        if log:
            log_scale(axes, "y", [p.value for p in points])
        axes.set_xlabel(axis_label(bits_label))
        axes.set_ylabel(axis_label(quantity))
        axes.margins(x=0.06, y=0.08)
        legend_below(axes, columns=3)
    return figure
