"""Singular spectra: of the weight, of the weight seen through its inputs, of what is left over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from convex_caldera.report.plots.canvas import (
    HEIGHT,
    SEQUENTIAL,
    WIDTH,
    axis_label,
    label,
    log_scale,
    looks,
    new_figure,
    style,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FLOOR = 1e-12  # relative to the largest; below it is rounding


def draw_spectra(
    panels: Mapping[str, Sequence[Sequence[float]]],
    *,
    names: Sequence[str] | None = None,
    index: Sequence[Sequence[float]] | None = None,
    relative: bool = True,
) -> Figure:
    """One panel per kind of spectrum, one line per layer, dark for early layers, light for late.

    Args:
        panels: title -> singular values of every layer, largest first.
        names: of the layers; a legend is drawn for up to six.
        index: of the layers: which singular values these are, from 1; all unless given.
        relative: divide by the largest value of the same spectrum, and the index by its length,
            so that layers of different size can be compared.
    """
    from matplotlib import colormaps

    with style():
        figure, axes = new_figure(
            len(panels), 1, height=0.6 + 0.62 * HEIGHT * len(panels), sharex=True, squeeze=False
        )
        axes = axes[:, 0]
        colours = colormaps[SEQUENTIAL]
        for panel, (title, spectra) in zip(axes, panels.items(), strict=True):
            for i, values in enumerate(spectra):
                x, y = _line(values, relative, None if index is None else index[i])
                shade = colours(0.05 + 0.8 * i / max(1, len(spectra) - 1))
                name = label(names[i], 30) if names is not None and i < len(names) else None
                dash = ("-", "--", "-.", ":")[i % 4] if len(spectra) <= 8 else "-"
                panel.plot(x, y, color=shade, linestyle=dash, linewidth=1.1, label=name)
            log_scale(panel, "y", [v for line in panel.lines for v in line.get_ydata()])
            panel.set_title(axis_label(title))
            panel.set_ylabel("σᵢ / σ₁" if relative else "singular value")
        axes[-1].set_xlabel("index / number of singular values" if relative else "index")
        if names is not None and 1 < len(names) <= 6:
            handles, shown = axes[0].get_legend_handles_labels()
            figure.legend(handles, shown, loc="outside lower center", ncols=2)
    return figure


def draw_comparison(panels: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Up to four panels, two by two, each with named spectra on one logarithmic axis."""
    rows = max(1, -(-len(panels) // 2))
    with style():
        figure, grid = new_figure(
            rows, 2, width=1.15 * WIDTH, height=0.5 + 2.3 * rows, squeeze=False
        )
        for panel in grid.flat[len(panels) :]:
            panel.set_visible(False)
        everything = looks(name for lines in panels.values() for name in lines)
        for panel, (title, lines) in zip(grid.flat, panels.items(), strict=False):
            for name, values in lines.items():
                x, y = _line(values, relative=False)
                look = {**everything[name], "marker": None}
                panel.plot(x, y, label=label(name, 30), **look)
            log_scale(panel, "y", [v for line in panel.lines for v in line.get_ydata()])
            panel.set_title(label(title))
            panel.set_xlabel("index")
            panel.set_ylabel("singular value")
            panel.legend()
    return figure


def _line(
    values: Sequence[float], relative: bool, index: Sequence[float] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    y = np.asarray(values, dtype=np.float64)
    x = np.arange(1, y.size + 1) if index is None else np.asarray(index)
    x = x.astype(np.float64)
    top = y.max(initial=0.0)
    keep = y > FLOOR * top
    if relative and top > 0:
        x, y = x / x[-1], y / top
    return x[keep], y[keep]
