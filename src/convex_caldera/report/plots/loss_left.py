"""Loss left by the best factors of each rank: what low rank can buy, before any code is spent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

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

FLOOR = 1e-4  # of the whole loss; nobody buys rank to go below
MARKERS_PER_LINE = 7

Curve = tuple[Sequence[float], Sequence[float]]  # ranks, share of the loss left at each


def draw_loss_left(
    curves: Mapping[str, Sequence[Curve]],
    *,
    chosen: Mapping[str, Sequence[float]] | None = None,
    quantity: str = "share of tr(W H Wᵀ) left",
) -> Figure:
    """One line per kind of matrix: the median over its layers, and a band from least to most.

    Args:
        curves: kind -> (ranks, loss left) of every layer; rank 0, where all is left, is not drawn.
        chosen: kind -> ranks that its layers have; ticks at the foot of the figure.
        quantity: label of the vertical axis.
    """
    with style():
        figure, axes = new_figure(height=4.2)
        everything: list[float] = []
        for kind, look in looks(curves).items():
            ranks, left = _together(curves[kind])
            if not ranks.size:
                continue
            middle = np.median(left, axis=0)
            everything += middle.tolist()
            every = max(1, len(ranks) // MARKERS_PER_LINE)
            axes.plot(ranks, middle, label=label(kind), **look, markevery=every)
            if len(left) > 1:
                axes.fill_between(
                    ranks, left.min(axis=0), left.max(axis=0), color=look["color"], alpha=0.13, lw=0
                )
            for rank in sorted({r for r in (chosen or {}).get(kind, ()) if r > 0}):
                foot = axes.get_xaxis_transform()
                axes.plot([rank], [0.0], marker="|", markersize=16, color=look["color"],
                          transform=foot, clip_on=False)  # fmt: skip
        log_scale(axes, "y", everything)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, position: f"{value:g}")
        axes.set_xlabel("rank")
        axes.set_ylabel(axis_label(quantity))
        legend_below(axes, columns=4)
    return figure


def _together(curves: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray]:
    """Ranks >= 1 and the layers' losses at them (layers, ranks), on the first layer's ranks.

    Layers of one kind and different size are interpolated; what is rounding is cut.
    """
    grid = np.array([rank for rank in curves[0][0] if rank >= 1]) if curves else np.empty(0)
    rows = [np.interp(grid, ranks, left) for ranks, left in curves if len(ranks)]
    if not grid.size or not rows:
        return np.empty(0), np.empty((0, 0))
    left = np.stack(rows)
    keep = (left > FLOOR).all(axis=0)
    return grid[keep], left[:, keep]
