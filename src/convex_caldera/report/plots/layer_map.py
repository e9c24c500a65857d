"""Heat map of one number per layer: blocks from left to right, kinds of matrices downwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from convex_caldera.report.plots.canvas import SEQUENTIAL, axis_label, label, new_figure, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_NUMBERED_COLUMNS = 12
MOST_RULED_COLUMNS = 48  # beyond, the white rules would take more room than the cells
ROW_INCHES = 0.34
MARGIN_INCHES = 1.0


def draw_layer_map(
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    quantity: str,
    number_format: str = ".2f",
    column_label: str = "block",
) -> Figure:
    """A cell per layer; the number stands in it where there is room.

    Args:
        values: (rows, columns); NaN where there is no such layer, drawn hatched.
        rows, columns: their names.
        quantity: label of the colour bar, with its unit.
        number_format: of the numbers in the cells.
        column_label: of the horizontal axis.
    """
    values = np.asarray(values, dtype=np.float64)
    with style():
        figure, axes = new_figure(height=MARGIN_INCHES + ROW_INCHES * max(len(rows), 2))
        low, high = _limits(values)
        mesh = axes.pcolormesh(
            np.ma.masked_invalid(values),
            cmap=SEQUENTIAL,
            vmin=low,
            vmax=high,
            edgecolors="white",
            linewidth=0.5 if len(columns) <= MOST_RULED_COLUMNS else 0,
        )
        axes.set_facecolor("#F2F2F2")
        axes.invert_yaxis()
        axes.grid(False)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.set_yticks(np.arange(len(rows)) + 0.5, [label(name, 28) for name in rows])
        step = max(1, -(-len(columns) // 20))
        shown = range(0, len(columns), step)
        axes.set_xticks([i + 0.5 for i in shown], [label(columns[i], 12) for i in shown])
        axes.set_xlabel(axis_label(column_label))
        bar = figure.colorbar(
            mesh, ax=axes, label=axis_label(quantity), pad=0.015, fraction=0.05, aspect=14
        )
        if number_format == ".0f":
            bar.ax.yaxis.get_major_locator().set_params(integer=True)
            bar.update_ticks()
        if len(columns) <= MOST_NUMBERED_COLUMNS:
            _write_numbers(axes, values, low, high, number_format)
    return figure


def _write_numbers(axes: Axes, values: np.ndarray, low: float, high: float, form: str) -> None:
    small = len(values[0]) > 10
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            dark = (value - low) / (high - low) < 0.5
            axes.text(
                j + 0.5,
                i + 0.5,
                format(value, form),
                ha="center",
                va="center",
                fontsize=6.5 if small else 8.5,
                color="white" if dark else "black",
            )


def _limits(values: np.ndarray) -> tuple[float, float]:
    """Limits of the colours; a constant map lies in the middle of its own."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return 0.0, 1.0
    low, high = float(finite.min()), float(finite.max())
    return (low, high) if high > low else (low - 0.5, high + 0.5)
