"""Claims about every layer under the calibration statistics: its weighted error and its program.

Three kinds of layers are set aside, and counted in what is said. The values of a layer that was
fine-tuned are no longer those whose error is claimed. A layer whose gradients vanished, so that
its curvature is zero, was rounded under its inputs' second moment instead; the report names it,
and it is believed only where the saved curvature is in fact zero. An output head whose statistics
were not saved has no weighted error that could be recomputed (`embeddings`).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from convex_caldera.certify import plan_claims
from convex_caldera.certify.embeddings import sides_of, unseen_heads
from convex_caldera.certify.layer_programs import check_layer_program
from convex_caldera.certify.losses import check_loss, recompute
from convex_caldera.certify.reader import Layer, Output
from convex_caldera.certify.source import Source
from convex_caldera.certify.statistics import Sides, Statistics
from convex_caldera.certify.strict import listing, short
from convex_caldera.certify.tuned import tuned_layers
from convex_caldera.certify.waterfilling import check_distance
from convex_caldera.errors import CheckError

FALLBACK = "input_curvature_only"  # key of the report


def identity(layer: Layer) -> Sides:
    """H = I: the plain squared error, of methods that see no data."""
    return Sides(np.eye(layer.spec.shape[1]))


def check_statistics(output: Output, source: Source, statistics: Statistics) -> str:
    """The statistics are those of the model."""
    if statistics.provenance["model"] != source.fingerprint():
        raise CheckError("the statistics were collected on another model")
    heads = statistics.heads
    if heads is not None and heads.provenance["model"] != statistics.provenance["model"]:
        raise CheckError("the statistics of the output head were collected on another model")
    for name in fallbacks(output):
        sides = sides_of(output, statistics, name)
        if sides is None or sides.H.any():
            raise CheckError(f"{short(name)} has a curvature, though the report says it has none")
    return f"{statistics.kind} curvature"


def fallbacks(output: Output) -> frozenset[str]:
    """Layers that were rounded under their inputs alone."""
    names = listing(output.report.get(FALLBACK, []), f"report: {FALLBACK}")
    for name in names:
        if not isinstance(name, str) or name not in output.layers:
            raise CheckError(f"report: {FALLBACK}: {short(name)} is not stored")
    return frozenset(names)


def check_losses(output: Output, source: Source, statistics: Statistics) -> str:
    """Weighted errors of all layers from their codes, and their distance from waterfilling."""
    total = worst = 0.0
    tuned, without = tuned_layers(output), fallbacks(output)
    unseen = unseen_heads(output, statistics)
    aside = set(tuned) | without | unseen
    for name in _others(output, aside):
        record = output.report["layers"][name]
        sides = _known_sides(output, statistics, name)
        W = source.weight(f"{name}.weight")
        found = recompute(output.layers[name], W, sides)
        check_loss(name, found, record)
        if output.certificate is not None:
            gap = output.certificate["layers"][name]["gap_to_waterfilling_bits"]
            check_distance(name, W, sides, record["bits"], record["loss"], gap)
        total += found.loss
        if found.loss > 0:
            worst = max(worst, found.tolerance / found.loss)
    count = f"{len(output.layers) - len(aside)} layers"
    count += f" ({len(tuned)} tuned)" if tuned else ""
    count += f" ({len(without)} without curvature)" if without else ""
    count += " (the output head not: its statistics were not saved)" if unseen else ""
    return f"{count}, sum {total:.6g}, each within {worst:.1e} relative"


def check_programs(output: Output, source: Source, statistics: Statistics) -> str:
    """Primal and dual value of every layer's low-rank program, errors bounded."""
    certificate = plan_claims.certificate_of(output)
    curves, price = plan_claims.curves_of(output), certificate["plan"]["price"]
    gaps, ranks = [], []
    for name in _others(output, fallbacks(output) | unseen_heads(output, statistics)):
        record = certificate["layers"][name]
        distortion = float(curves.menus[name][record["label"]][1])
        paid = price * (record["option_loss"] / distortion) if distortion > 0 else 0.0
        H = _known_sides(output, statistics, name).H
        W = source.weight(f"{name}.weight")
        found = check_layer_program(name, record["program"], W, H, record["loss"], paid)
        if found is not None:
            gaps.append(found.gap)
            ranks.append(record["program"]["rank"])
    if not gaps:
        return "no layer states one: loss or price is zero"
    return f"{len(gaps)} layers, gaps at most {max(gaps):.1e}, ranks {min(ranks)} to {max(ranks)}"


def _others(output: Output, aside: set[str] | frozenset[str]) -> Iterator[str]:
    return (name for name in sorted(output.layers) if name not in aside)


def _known_sides(output: Output, statistics: Statistics, name: str) -> Sides:
    sides = sides_of(output, statistics, name)
    if sides is None:
        raise CheckError(f"the statistics have no {short(name)}")
    return sides
