"""Plots under the names that users of Convex-CALDERA's first scripts know.

Thin functions: arrays in, one file out (.png, .svg or .pdf by the path's suffix), path returned.
The files those scripts wrote have their names in `FILE_NAMES`. Different on purpose: maps are
cividis instead of viridis, losses are never called duality gaps, and a bit is a stored bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from convex_caldera.errors import ShapeError
from convex_caldera.report.plots.canvas import save
from convex_caldera.report.plots.layer_map import draw_layer_map
from convex_caldera.report.plots.loss_rank import draw_loss_rank
from convex_caldera.report.plots.quality import Quality, draw_quality
from convex_caldera.report.plots.rank_bits import draw_rank_bits
from convex_caldera.report.plots.spectra import draw_comparison, draw_spectra

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike

FILE_NAMES = {
    "plot_singular_value_spectra": "singular_values.png",
    "plot_bit_allocation_heatmap": "bit_allocation.png",
    "plot_accuracy_vs_bits": "accuracy_vs_bits.png",
    "plot_loss_vs_rank": "loss_vs_rank.png",
    "plot_error_heatmap": "heatmap_error_rank_bits.png",
    "plot_bits_heatmap": "heatmap_bits_rank_bits.png",
    "plot_error_vs_bits_by_rank": "curve_error_vs_bits_by_rank.png",
    "plot_singular_values_comparison": "scl_singular_values_comparison.png",
}


def plot_bit_allocation_heatmap(
    bits: ArrayLike,
    path: str | Path,
    *,
    layers: Sequence[str] | None = None,
    groups: Sequence[str] | None = None,
) -> Path:
    """Heat map of an allocation.

    Args:
        bits: (layers, groups) bits per weight; NaN where a layer lacks a group.
        path: file to write.
        layers, groups: their names; numbers by default.

    Raises:
        ShapeError: not a matrix, or names that do not fit it.
    """
    matrix = _matrix(bits, "bits")
    rows = _names(groups, matrix.shape[1], "groups")
    columns = _names(layers, matrix.shape[0], "layers")
    figure = draw_layer_map(
        matrix.T, rows, columns, quantity="bits per weight", column_label="layer"
    )
    return _saved(figure, path)


def plot_accuracy_vs_bits(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    path: str | Path,
    *,
    original: float | None = None,
    quantity: str = "accuracy",
) -> Path:
    """Accuracy over bits per weight.

    Args:
        curves: method -> (bits, accuracies).
        path: file to write.
        original: accuracy of the model that was not compressed.
        quantity: label of the vertical axis, with its unit.

    Raises:
        ShapeError: a curve whose two lists differ in length.
    """
    points = [
        Quality(method, bits, value)
        for method, pair in curves.items()
        for bits, value in _pairs(method, *pair)
    ]
    figure = draw_quality(
        points, quantity=quantity, original=original, bits_label="stored bits per weight"
    )
    return _saved(figure, path)


def plot_loss_vs_rank(
    ranks: Sequence[float],
    losses: Mapping[str, Sequence[float]] | Sequence[float],
    path: str | Path,
    *,
    quantity: str = "relative loss",
) -> Path:
    """Loss over rank, both logarithmic where no value is zero.

    Args:
        ranks: of every point.
        losses: one list, or name -> list.
        path: file to write.
        quantity: label of the vertical axis, with its unit.

    Raises:
        ShapeError: ranks and losses differ in length.
    """
    named = losses if isinstance(losses, Mapping) else {"loss": losses}
    series = {name: _pairs(name, ranks, values) for name, values in named.items()}
    return _saved(draw_loss_rank(series, quantity=quantity, joined=True, log_rank=True), path)


def plot_singular_value_spectra(
    spectra: Mapping[str, Sequence[float]], path: str | Path, *, title: str = "singular values"
) -> Path:
    """Singular values of several matrices on one logarithmic axis; name -> values."""
    ordered = [sorted((float(v) for v in values), reverse=True) for values in spectra.values()]
    figure = draw_spectra({title: ordered}, names=list(spectra), relative=False)
    return _saved(figure, path)


def plot_singular_values_comparison(
    panels: Mapping[str, Mapping[str, Sequence[float]]], path: str | Path
) -> Path:
    """Up to four panels, two by two: title -> name -> singular values.

    Raises:
        ShapeError: no panel or more than four.
    """
    if not 1 <= len(panels) <= 4:
        raise ShapeError(f"a comparison has one to four panels, got {len(panels)}")
    return _saved(draw_comparison(panels), path)


def plot_error_heatmap(
    error: ArrayLike,
    ranks: Sequence[float],
    bits: Sequence[float],
    path: str | Path,
    *,
    stored_bits: ArrayLike | None = None,
    budget: float | None = None,
) -> Path:
    """Relative error over ranks x bits, with the stored size of every setting if it is given.

    Args:
        error: (ranks, bits).
        ranks, bits: of rows and columns.
        path: file to write.
        stored_bits: (ranks, bits) stored bits per weight.
        budget: stored bits per weight that are affordable.

    Raises:
        ShapeError: matrices that do not fit ranks and bits.
    """
    values = _rank_bits(error, ranks, bits, "error")
    stored = None if stored_bits is None else _rank_bits(stored_bits, ranks, bits, "stored_bits")
    figure = draw_rank_bits(
        values, ranks, bits, quantity="relative error", stored_bits=stored, budget=budget
    )
    return _saved(figure, path)


def plot_bits_heatmap(
    stored_bits: ArrayLike, ranks: Sequence[float], bits: Sequence[float], path: str | Path
) -> Path:
    """Stored bits per weight over ranks x bits. Raises ShapeError as `plot_error_heatmap`."""
    values = _rank_bits(stored_bits, ranks, bits, "stored_bits")
    return _saved(draw_rank_bits(values, ranks, bits, quantity="stored bits per weight"), path)


def plot_error_vs_bits_by_rank(
    error: ArrayLike, ranks: Sequence[float], bits: Sequence[float], path: str | Path
) -> Path:
    """One curve of error over bits per rank. Raises ShapeError as `plot_error_heatmap`."""
    values = _rank_bits(error, ranks, bits, "error")
    points = [
        Quality(f"rank {rank:g}", float(b), float(value))
        for rank, row in zip(ranks, values, strict=True)
        for b, value in zip(bits, row, strict=True)
    ]
    figure = draw_quality(
        points, quantity="relative error", log=True, bits_label="bits of the codes per weight"
    )
    return _saved(figure, path)


def _saved(figure: Figure, path: str | Path) -> Path:
    return save(figure, Path(path))[0]


def _matrix(values: ArrayLike, name: str) -> np.ndarray:
    matrix = np.asarray(values, dtype=np.float64)
    if matrix.ndim != 2 or not matrix.size:
        raise ShapeError(f"{name} must be a matrix that is not empty, got shape {matrix.shape}")
    return matrix


def _rank_bits(
    values: ArrayLike, ranks: Sequence[float], bits: Sequence[float], name: str
) -> np.ndarray:
    matrix = _matrix(values, name)
    if matrix.shape != (len(ranks), len(bits)):
        raise ShapeError(
            f"{name} has shape {matrix.shape}, but there are {len(ranks)} ranks and "
            f"{len(bits)} bits; rows are ranks, columns bits"
        )
    return matrix


def _names(names: Sequence[str] | None, number: int, what: str) -> list[str]:
    if names is None:
        return [str(i) for i in range(number)]
    if len(names) != number:
        raise ShapeError(f"{len(names)} names for {number} {what}")
    return list(names)


def _pairs(name: str, x: Sequence[float], y: Sequence[float]) -> list[tuple[float, float]]:
    if len(x) != len(y):
        raise ShapeError(f"{name}: {len(x)} values on the horizontal axis, {len(y)} on the other")
    return [(float(a), float(b)) for a, b in zip(x, y, strict=True)]
