"""Rank x bits: a map of the error (or of the stored bits) over both ways to spend bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from convex_caldera.report.plots.canvas import (
    SEQUENTIAL,
    axis_label,
    new_figure,
    plain_colour_bar,
    style,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_NUMBERED, MOST_NUMBERED_COLUMNS = 120, 8  # cells; more columns leave no room for numbers
LOG_RANGE = 30.0  # largest over smallest from which colours are logarithmic


def draw_rank_bits(
    values: np.ndarray,
    ranks: Sequence[float],
    bits: Sequence[float],
    *,
    quantity: str,
    stored_bits: np.ndarray | None = None,
    budget: float | None = None,
) -> Figure:
    """A cell per (rank, bits) with its value, and its stored size where that is known.

    With too many cells for numbers, lines of equal stored size take their place.

    Args:
        values: (ranks, bits); NaN where nothing was measured.
        ranks, bits: of rows and columns.
        quantity: label of the colour bar.
        stored_bits: (ranks, bits) stored bits per weight.
        budget: with lines, one more and thicker: what is affordable lies to its lower left.
    """
    from matplotlib.colors import LogNorm, Normalize

    values = np.asarray(values, dtype=np.float64)
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    wide = low > 0 and high / low > LOG_RANGE
    norm = LogNorm(low, high) if wide else Normalize(low, high if high > low else low + 1)
    with style():
        figure, axes = new_figure(height=1.2 + 0.4 * max(4, len(ranks)))
        mesh = axes.pcolormesh(
            np.ma.masked_invalid(values), cmap=SEQUENTIAL, norm=norm, edgecolors="white", lw=0.5
        )
        axes.grid(False)
        axes.tick_params(length=0)
        axes.set_xticks(np.arange(len(bits)) + 0.5, [f"{b:g}" for b in bits])
        axes.set_yticks(np.arange(len(ranks)) + 0.5, [f"{r:g}" for r in ranks])
        axes.set_xlabel("bits of the codes per weight")
        axes.set_ylabel("rank of the low-rank part")
        plain_colour_bar(figure.colorbar(mesh, ax=axes, label=axis_label(quantity), pad=0.02))
        stored = None if stored_bits is None else np.asarray(stored_bits, dtype=np.float64)
        if values.size <= MOST_NUMBERED and len(bits) <= MOST_NUMBERED_COLUMNS:
            _write_numbers(axes, values, stored, lambda value: norm(value) < 0.5)
        elif stored is not None:
            _contours(axes, stored, budget)
    return figure


def _write_numbers(
    axes: Axes, values: np.ndarray, stored: np.ndarray | None, is_dark: Callable[[float], bool]
) -> None:
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            place: dict[str, Any] = {
                "ha": "center",
                "color": "white" if is_dark(value) else "black",
            }
            if stored is None:
                axes.text(j + 0.5, i + 0.5, f"{value:.3g}", va="center", fontsize=7.5, **place)
            else:
                axes.text(j + 0.5, i + 0.5, f"{value:.3g}", va="bottom", fontsize=7.5, **place)
                size = f"{stored[i, j]:.2f} bits"
                axes.text(j + 0.5, i + 0.45, size, va="top", fontsize=6, **place)


def _contours(axes: Axes, stored_bits: np.ndarray, budget: float | None) -> None:
    x, y = np.arange(stored_bits.shape[1]) + 0.5, np.arange(stored_bits.shape[0]) + 0.5
    if stored_bits.min() < stored_bits.max():
        lines = axes.contour(x, y, stored_bits, levels=5, colors="black", linewidths=0.8)
        axes.clabel(lines, fmt="%.3g bits", fontsize=7.5)
    if budget is not None and stored_bits.min() < budget < stored_bits.max():
        axes.contour(x, y, stored_bits, levels=[budget], colors="black", linewidths=2.2)
