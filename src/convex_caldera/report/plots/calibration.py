"""Predicted beside measured: is the model of the loss to be trusted, layer by layer?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

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

GOOD_RATIO = (0.7, 1.4)  # measured / predicted; the band in which a prediction counts as right


def draw_calibration(
    predicted: Sequence[float],
    measured: Sequence[float],
    kinds: Sequence[str],
    *,
    quantity: str = "KL of this layer alone (nats per token)",
) -> Figure:
    """Log-log scatter with the identity, the band of good ratios, and the rank correlation.

    Args:
        predicted, measured: one value per layer; pairs with a value <= 0 cannot be drawn on
            these axes and are counted in the corner.
        kinds: kind of matrix of each, for the legend.
        quantity: of both axes.
    """
    x, y = np.asarray(predicted, dtype=np.float64), np.asarray(measured, dtype=np.float64)
    shown = (x > 0) & (y > 0)
    with style():
        figure, axes = new_figure(height=4.8)
        both = np.concatenate([x[shown], y[shown]])
        if both.size:
            ends = np.array([both.min() / 1.5, both.max() * 1.5])
            low, high = GOOD_RATIO
            axes.fill_between(ends, low * ends, high * ends, color="#EBEBEB", linewidth=0)
            axes.plot(ends, ends, color=BLACK, linewidth=1, linestyle="--")
            log_scale(axes, "x", ends)
            log_scale(axes, "y", ends)
            axes.set_xlim(*ends)
            axes.set_ylim(*ends)
        for kind, look in looks(kinds).items():
            own = shown & np.array([k == kind for k in kinds])
            axes.plot(x[own], y[own], label=label(kind, 28), **{**look, "linestyle": "none"})
        axes.set_aspect("equal")
        axes.set_xlabel(axis_label(f"predicted {quantity}"))
        axes.set_ylabel(axis_label(f"measured {quantity}".replace(" (", "\n(")))
        axes.text(0.03, 0.97, _summary(x, y, shown), transform=axes.transAxes, va="top", color=GREY)
        legend_below(axes, columns=4)
    return figure


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's: the correlation of the ranks, ties sharing their mean; NaN if one is constant."""
    if x.size < 2:
        return float("nan")
    a, b = _ranks(x) - (x.size - 1) / 2, _ranks(y) - (x.size - 1) / 2
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / scale if scale > 0 else float("nan")


def _ranks(values: np.ndarray) -> np.ndarray:
    distinct, where, counts = np.unique(values, return_inverse=True, return_counts=True)
    del distinct
    last = np.cumsum(counts)
    return (last - (counts + 1) / 2)[where]


def _summary(x: np.ndarray, y: np.ndarray, shown: np.ndarray) -> str:
    low, high = GOOD_RATIO
    ratio = y[shown] / x[shown]
    good = int(((ratio >= low) & (ratio <= high)).sum())
    lines = [
        f"rank correlation {rank_correlation(x, y):.3f}",
        f"{good} of {x.size} layers within {low:g} to {high:g}",
    ]
    if not shown.all():
        lines.append(f"{int((~shown).sum())} not shown (zero or negative)")
    return "\n".join(lines)
