"""Which figures a report has: from runs and evaluations to the arrays that plots/ draws.

A figure that has nothing to say (all ranks equal, nothing measured) is left out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from convex_caldera.report.byte_parts import PARTS, REST
from convex_caldera.report.names import short_kinds
from convex_caldera.report.plots.by_layer import draw_by_layer
from convex_caldera.report.plots.byte_bars import draw_byte_bars
from convex_caldera.report.plots.calibration import draw_calibration
from convex_caldera.report.plots.layer_map import draw_layer_map
from convex_caldera.report.plots.loss_left import draw_loss_left
from convex_caldera.report.plots.loss_rank import draw_loss_rank
from convex_caldera.report.plots.price import draw_price
from convex_caldera.report.plots.quality import Quality, draw_quality
from convex_caldera.report.plots.rank_bits import draw_rank_bits
from convex_caldera.report.plots.spectra import draw_spectra
from convex_caldera.report.rows import ORIGINAL, Entry, entries, shown
from convex_caldera.report.run import EvaluationFile, LayerRow, Run, Score

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PROGRAM_GAP = 1e-6  # the relative gap that a layer's program is solved to
OUTSIDE = "–"  # column of layers that are in no block
SPECTRUM_TITLES = {
    "weight": "weight W",
    "whitened": "weight seen through its inputs, W C with C Cᵀ = H",
    "residual": "what compression leaves over, (W − Ŵ) C",
}


@dataclass(frozen=True)
class Picture:
    """A figure to be: its file name, what it shows, and which command its numbers come from.

    `source` is the page's anchor of that command: "eval-2", or "" for the commands of the run.
    """

    name: str
    title: str
    caption: str
    source: str
    draw: Callable[[], Figure]


def comparison_pictures(
    runs: Sequence[Run], evaluations: Sequence[EvaluationFile]
) -> Iterator[Picture]:
    """Figures over all runs: quality versus bits, and where the bytes went."""
    everything = entries(runs, evaluations)
    for e, evaluation in enumerate(evaluations):
        suffix = f"_{e + 1}" if len(evaluations) > 1 else ""
        yield from _quality_pictures(everything, e, evaluation, suffix)
    with_parts = [run for run in runs if run.byte_parts]
    if with_parts:
        bars = {run.title: _parts(run, 1e-3) for run in with_parts}
        yield Picture(
            "bytes_by_file",
            "Where the bytes went",
            "Weight files of each model. What is kept as it was (embeddings, norms, biases) is in "
            "the files too and counted in their size.",
            "",
            partial(draw_byte_bars, bars, PARTS, quantity="size of the weight files (kB)"),
        )
    if len(with_parts) > 1:
        bits = {run.title: _parts(run, 8 / run.compressed_weights, {REST}) for run in with_parts}
        yield Picture(
            "bits_by_file",
            "Where the bits of a compressed weight went",
            "The compressed layers alone, file headers included.",
            "",
            partial(draw_byte_bars, bits, PARTS, quantity="stored bits per compressed weight"),
        )


def run_pictures(run: Run) -> Iterator[Picture]:
    """Figures of one run."""
    yield from _maps(run)
    yield _by_layer(
        run,
        "relative_loss_by_layer",
        "Relative loss of every layer",
        "tr(E H Eᵀ) / tr(W H Wᵀ) with the undamped second moments H of the layer's inputs.",
        lambda layer: layer.relative_loss,
        quantity="relative loss",
        log=True,
    )
    if len({layer.rank for layer in run.layers}) > 1:
        yield Picture(
            "loss_vs_rank",
            "Loss and rank of every layer",
            "One point per layer; kinds of equal rank stand side by side.",
            "",
            partial(draw_loss_rank, _by_kind(run, lambda r: r.rank, lambda r: r.relative_loss)),
        )
    if run.byte_parts:
        yield Picture(
            "bytes_by_kind",
            "Where the bits of a weight went",
            "Stored bits per original weight, by kind of matrix.",
            "",
            partial(draw_byte_bars, _kind_parts(run), PARTS, quantity="stored bits per weight"),
        )
    yield from _price_of_a_bit(run)
    yield from _gaps(run)
    yield from _predicted_beside_measured(run)
    yield from _measurement_pictures(run)


def _maps(run: Run) -> Iterator[Picture]:
    rows, columns, _ = _grid(run, lambda layer: 0.0)
    for name, title, quantity, form, value in (
        ("bit_allocation", "Bits of every layer", "stored bits per weight", ".2f", _bits),
        ("rank_allocation", "Rank of every layer", "rank", ".0f", _rank),
    ):
        values = _grid(run, value)[2]
        if name == "rank_allocation" and not np.nanmax(values) > 0:
            continue
        caption = "Codes, factors, scales and signs, over the original number of weights."
        yield Picture(
            name,
            title,
            caption if name == "bit_allocation" else "Rank of the low-rank part; 0 means none.",
            "",
            partial(draw_layer_map, values, rows, columns, quantity=quantity, number_format=form),
        )


def _price_of_a_bit(run: Run) -> Iterator[Picture]:
    c = run.certificate
    if c is not None and len(c.frontier) > 2 and c.weights:
        yield Picture(
            "price_curve",
            "Loss and price of a bit",
            "Above: the lower hull of all plans that the measured options allow, and the plan "
            "that was chosen. Below: the slope of the hull, which is the dual price of the budget.",
            "",
            partial(
                draw_price,
                [point.bits / c.weights for point in c.frontier],
                [point.distortion for point in c.frontier],
                [point.price * c.weights for point in c.frontier],
                plan=(c.bits / c.weights, c.distortion, c.price * c.weights),
                budget=c.budget_bits / c.weights,
                unit=c.unit or "loss",
            ),
        )


def _gaps(run: Run) -> Iterator[Picture]:
    if any(layer.gap_bits is not None for layer in run.layers):
        yield _by_layer(
            run,
            "gap_by_layer",
            "Gap to the limit, layer by layer",
            "Bits per weight that an ideal coder of a Gaussian source with this covariance "
            "(reverse water-filling) would save at the same loss. Conditional on that model.",
            lambda layer: layer.gap_bits,
            quantity="gap (bits per weight)",
            limit=(0.0, "reverse water-filling"),
        )
    if any(layer.program_gap is not None for layer in run.layers):
        yield _by_layer(
            run,
            "program_gap_by_layer",
            "Duality gap of every layer's low-rank program",
            "(primal − dual) / primal of the convex program that decides the rank, both values "
            "enclosed by the certificate. It bounds how far from optimal that relaxation is "
            "solved, and says nothing about the plan.",
            lambda layer: layer.program_gap,
            quantity="relative gap",
            log=True,
            limit=(PROGRAM_GAP, "goal"),
        )


def _predicted_beside_measured(run: Run) -> Iterator[Picture]:
    both = [r for r in run.layers if r.predicted_kl is not None and r.measured_kl is not None]
    if both:
        short = short_kinds({layer.place.kind for layer in both})
        yield Picture(
            "predicted_vs_measured",
            "Predicted beside measured loss",
            "Each layer compressed alone, all others original. On the dashed line the prediction "
            f"is exact; the grey band is a factor of 0.7 to 1.4.{_measured_on(run)}",
            "",
            partial(
                draw_calibration,
                [float(layer.predicted_kl or 0.0) for layer in both],
                [float(layer.measured_kl or 0.0) for layer in both],
                [short[layer.place.kind] for layer in both],
            ),
        )


def _measurement_pictures(run: Run) -> Iterator[Picture]:
    if run.spectra:
        panels = {
            title: [s.values.get(key, ()) for s in run.spectra]
            for key, title in SPECTRUM_TITLES.items()
            if any(key in s.values for s in run.spectra)
        }
        yield Picture(
            "singular_values",
            "Singular spectra",
            "One line per layer, dark for the first, light for the last. Low rank pays where a "
            "line falls steeply at the left.",
            "",
            partial(
                draw_spectra,
                panels,
                names=[s.name for s in run.spectra],
                index=[s.index for s in run.spectra],
            ),
        )
        yield from _loss_left(run)
    if run.landscape is not None:
        land = run.landscape
        stored = None if land.stored_bits is None else np.array(land.stored_bits)
        yield Picture(
            "heatmap_error_rank_bits",
            f"Error over rank and bits{': ' + land.title if land.title else ''}",
            "Every cell is one setting of the same layers"
            + ("." if stored is None else ", with its stored bits per weight."),
            "",
            partial(
                draw_rank_bits,
                np.array(land.error),
                land.ranks,
                land.bits,
                quantity="relative error",
                stored_bits=stored,
            ),
        )


def _loss_left(run: Run) -> Iterator[Picture]:
    short = short_kinds({spectra.place.kind for spectra in run.spectra})
    curves: dict[str, list[tuple[Sequence[float], Sequence[float]]]] = defaultdict(list)
    for spectra in run.spectra:
        if spectra.ranks:
            curves[short[spectra.place.kind]].append((spectra.ranks, spectra.loss_left))
    if curves:
        chosen = _by_kind(run, lambda layer: layer.rank, lambda layer: float(layer.rank))
        yield Picture(
            "loss_left_by_rank",
            "Loss versus rank",
            "Share of the weighted energy of W that the best factors of each rank leave: the "
            "median of each kind of matrix, and a band over its layers. Ticks at the foot are "
            "ranks that were chosen. Codes quantize what is left.",
            "",
            partial(
                draw_loss_left, curves, chosen={k: [r for r, _ in v] for k, v in chosen.items()}
            ),
        )


def _quality_pictures(
    everything: Sequence[Entry], e: int, evaluation: EvaluationFile, suffix: str
) -> Iterator[Picture]:
    scored = [(entry, entry.scores[e]) for entry in everything]
    originals = [s for entry, s in scored if entry.method == ORIGINAL and s is not None]
    text = f" on {shown(evaluation.text)}" if evaluation.text else ""
    measures: tuple[tuple[str, str, str, float, bool, float | None, Callable[[Score], tuple]], ...]
    first = originals[0] if originals else None
    measures = (
        ("perplexity", "Perplexity", "perplexity", 1, True,
         None if first is None else first.perplexity,
         lambda s: (s.perplexity, s.perplexity_stderr)),
        ("kl", "Divergence from the original", "KL (nats per token)", 1, True, None,
         lambda s: (s.kl, s.kl_stderr)),
        ("accuracy", "Agreement with the original", "same first token (%)", 100, False,
         100.0 if first is not None else None,
         lambda s: (s.top1, s.top1_stderr)),
    )  # fmt: skip
    for name, title, quantity, unit, log, original, value in measures:
        points = []
        for entry, score in scored:
            if entry.method == ORIGINAL or score is None or entry.bits is None:
                continue
            mean, error = value(score)
            method = entry.method if entry.run is not None else entry.name
            points.append(
                Quality(method, entry.bits, unit * mean, None if error is None else unit * error)
            )
        if points:
            yield Picture(
                f"{name}_vs_bits{suffix}",
                f"{title} versus bits{text}",
                f"Bars: one standard error. {evaluation.protocol_words}".strip(),
                f"eval-{e + 1}",
                partial(draw_quality, points, quantity=quantity, original=original, log=log),
            )


def _measured_on(run: Run) -> str:
    m = run.measured
    return "" if m is None or not m.text else f" Measured on {m.tokens:,} tokens of {m.text}."


def _by_layer(
    run: Run,
    name: str,
    title: str,
    caption: str,
    value: Callable[[LayerRow], float | None],
    **options: object,
) -> Picture:
    series = _by_kind(run, lambda layer: float(layer.place.block or 0), value)
    draw = partial(draw_by_layer, series, **options)  # type: ignore[arg-type]
    return Picture(name, title, caption, "", draw)


def _by_kind(
    run: Run, x: Callable[[LayerRow], float], y: Callable[[LayerRow], float | None]
) -> dict[str, list[tuple[float, float]]]:
    short = short_kinds({layer.place.kind for layer in run.layers})
    series: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for layer in run.layers:
        value = y(layer)
        if value is not None:
            series[short[layer.place.kind]].append((float(x(layer)), value))
    return dict(series)


def _grid(run: Run, value: Callable[[LayerRow], float]) -> tuple[list[str], list[str], np.ndarray]:
    """Kinds x blocks; where several layers share a cell (experts), their mean by weights."""
    kinds = list(dict.fromkeys(layer.place.kind for layer in run.layers))
    blocks = sorted({b for b in (layer.place.block for layer in run.layers) if b is not None})
    columns: list[int | None] = [*blocks]
    if any(layer.place.block is None for layer in run.layers):
        columns.append(None)
    sums, weights = np.zeros((2, len(kinds), len(columns)))
    for layer in run.layers:
        cell = kinds.index(layer.place.kind), columns.index(layer.place.block)
        sums[cell] += layer.weights * value(layer)
        weights[cell] += layer.weights
    values = np.full_like(sums, np.nan)
    np.divide(sums, weights, out=values, where=weights > 0)
    short = short_kinds(kinds)
    names = [OUTSIDE if column is None else str(column) for column in columns]
    return [short[kind] for kind in kinds], names, values


def _bits(layer: LayerRow) -> float:
    return layer.bits


def _rank(layer: LayerRow) -> float:
    return float(layer.rank)


def _parts(run: Run, scale: float, without: Collection[str] = ()) -> dict[str, float]:
    """Part -> bytes over all kinds, times a factor."""
    totals: dict[str, float] = defaultdict(float)
    for kind, parts in run.byte_parts.items():
        if kind not in without:
            for part, size in parts.items():
                totals[part] += scale * size
    return dict(totals)


def _kind_parts(run: Run) -> dict[str, dict[str, float]]:
    """Bits per weight of every kind, and of everything with the file headers."""
    weights: dict[str, int] = defaultdict(int)
    for layer in run.layers:
        weights[layer.place.kind] += layer.weights
    short = short_kinds(weights)
    bars: dict[str, dict[str, float]] = {}
    for kind, parts in run.byte_parts.items():
        if kind in weights:
            bars[short[kind]] = {part: 8 * size / weights[kind] for part, size in parts.items()}
    bars["all, with file headers"] = _parts(run, 8 / run.compressed_weights, {REST})
    return bars
