"""Curvature measured once more where it is used, at the compressed model.

first     the layers of a plan, in order, under the curvature of the original
measure   the curvature of the model with these layers, on the same text with labels of its own
second    the layers again, in order; rounding sees the mean of both curvatures
keep      the round that costs less on calibration windows held out

KL is quadratic in the error near the original only: along the way to the compressed model its
second derivative moves from the one curvature to the other. Losses stay those under the
original's, which the plan and its certificate are about.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor

from convex_caldera.core.recipe import Recipe
from convex_caldera.errors import RecipeError
from convex_caldera.models.checkpoint import hash_file
from convex_caldera.models.embeddings import EmbeddingSite, without_embeddings
from convex_caldera.recipes.records import canonical_json
from convex_caldera.storage.partial import PartialRun
from convex_caldera.workflow.collecting import curvature_in_context, provenance_of
from convex_caldera.workflow.compression import Compression
from convex_caldera.workflow.curvatures import GradientCurvatures
from convex_caldera.workflow.embedding_curvatures import gradient_curvatures, with_layers
from convex_caldera.workflow.held_out_kl import HeldOutKL
from convex_caldera.workflow.sequential import fit_in_order

# Added to the seed for the labels of the second measurement.
LABELS = 3


def fit_rounds(compression: Compression, recipes: Mapping[str, Recipe]) -> dict[str, Any]:
    """Fit and store the layers of a plan in order, in as many rounds as the user asked for.

    Returns:
        Notes for the report.
    """
    if compression.job.settings.remeasure:
        return fit_remeasured(compression, recipes)
    fit_in_order(compression, recipes)
    return {}


def fit_remeasured(compression: Compression, recipes: Mapping[str, Recipe]) -> dict[str, Any]:
    """Fit and store the layers of a plan, block after block, by the better of two rounds.

    Returns:
        For the report: KL on the windows held out after either round, and which one was kept.

    Raises:
        RecipeError: there is no curvature from gradients, or no window held out.
        DataError, NumericalError, ShapeError: as `fit_in_order`.

    Cost: twice that of `fit_in_order`, one more curvature pass, and two KL on held-out windows.
    Memory: the original's weights once more while the pass runs.
    """
    curvatures = gradient_curvatures(compression.fitter.curvatures)
    if curvatures is None or not curvatures.has_held_out:
        raise RecipeError("curvature is measured again from gradients, with windows held out")
    with _round(compression, "first") as first:
        fit_in_order(replace(compression, run=first), recipes)
        before = _held_out(curvatures, compression, first)
        second_fitter = _in_context(compression, curvatures, first)
        with _round(compression, "second") as second:
            fit_in_order(replace(compression, run=second, fitter=second_fitter), recipes)
            after = _held_out(curvatures, compression, second)
            kept = second if after.kl < before.kl else first
            for name in sorted(set(kept.done()) - compression.run.done()):
                compression.run.put(name, kept.get(name), kept.record(name))
    rounds = {"first": asdict(before), "second": asdict(after)}
    return {"remeasured": {**rounds, "kept": "second" if kept is second else "first"}}


@contextmanager
def _round(compression: Compression, name: str) -> Iterator[PartialRun]:
    """Where the layers of a round are kept, embeddings among them from the start."""
    fingerprint = {name: canonical_json(compression.job.fingerprint())}
    with PartialRun(compression.run.folder / name, fingerprint) as run:
        for site in compression.job.sites:
            if isinstance(site, EmbeddingSite) and site.name not in run.done():
                kept = compression.run
                run.put(site.name, kept.get(site.name), kept.record(site.name))
        yield run


def _decoded(compression: Compression, run: PartialRun) -> dict[str, Tensor]:
    return {site.name: run.get(site.name).decode() for site in compression.job.sites}


def _held_out(
    curvatures: GradientCurvatures, compression: Compression, run: PartialRun
) -> HeldOutKL:
    found = curvatures.held_out_kl(_decoded(compression, run), compression.progress)
    if found is None:
        raise RecipeError(
            "the model as transformers loads it holds layers in another form (experts); "
            "leave out --remeasure"
        )
    return found


def _in_context(compression: Compression, curvatures: GradientCurvatures, run: PartialRun) -> Any:
    """The fitter under the mean of the curvature there is and that of the model in `run`."""
    job, fitter = compression.job, compression.fitter
    layers = _decoded(compression, run)
    seed = job.settings.seed + LABELS
    draws = job.settings.draws
    original = provenance_of(job.curvature, job.skeleton, curvatures.used, seed, draws)
    files = "".join(hash_file(run.artefact(name)) for name in sorted(layers))
    changed = f"{original.model}+{hashlib.sha256(files.encode()).hexdigest()}"
    found = curvature_in_context(
        job.curvature,
        curvatures,
        layers,
        without_embeddings(job.sites),
        compression.run.folder / "context",
        replace(original, model=changed),
        compression.progress,
    )
    seen = with_layers(fitter.curvatures, curvatures.rounding_under(found))
    return replace(fitter, curvatures=seen)
