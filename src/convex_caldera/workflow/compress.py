"""The main job: calibrate, plan, fit every layer, store, and assemble a model directory.

Layers are fitted side by side, each on one thread with randomness of its own, so that neither
the number of workers nor their order shows in the bytes. Every finished layer is on disk before
the next begins: a run that is cut short goes on where it stopped and ends with the same files.
"""

from __future__ import annotations

import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from convex_caldera.calibrate.text import token_windows
from convex_caldera.errors import InterruptedRunError, RecipeError
from convex_caldera.models.embeddings import EmbeddingSite, copies_of
from convex_caldera.models.resolve import resolve_model
from convex_caldera.models.sites import Site
from convex_caldera.models.skeleton import Skeleton
from convex_caldera.models.tokenizer import load_tokenizer
from convex_caldera.recipes.table import method as method_named
from convex_caldera.storage.partial import PartialRun
from convex_caldera.storage.source import SourceModel
from convex_caldera.storage.write import rest_file_bytes
from convex_caldera.workflow.allocating import allocate_convex
from convex_caldera.workflow.choosing import sites_for
from convex_caldera.workflow.compression import Compression, Outcome
from convex_caldera.workflow.decoders import with_decoders
from convex_caldera.workflow.embedding_curvatures import gradient_curvatures
from convex_caldera.workflow.finishing import finish
from convex_caldera.workflow.fitting import Fitter, Task, fit_missing
from convex_caldera.workflow.gathering import curvatures_of, images_for
from convex_caldera.workflow.held_out_kl import expected_kl
from convex_caldera.workflow.job import Job
from convex_caldera.workflow.menu_allocating import allocate_menu
from convex_caldera.workflow.models import usable_device
from convex_caldera.workflow.planning import (
    Budget,
    check_ties,
    chosen_sites,
    fixed_budget,
    make_budget,
    uniform_plan,
)
from convex_caldera.workflow.progress import Progress, Silent
from convex_caldera.workflow.remeasuring import fit_rounds
from convex_caldera.workflow.settings import Settings
from convex_caldera.workflow.spending import fit_spending
from convex_caldera.workflow.summary import Summary, summary_of


def compress_to(
    settings: Settings,
    out: Path,
    *,
    progress: Progress | None = None,
    workers: int | None = None,
    hessians: Path | None = None,
    measured: Path | None = None,
) -> Summary:
    """Compress a model into the directory `out`; resumes a run that was cut short there.

    Args:
        settings: model, method, budget and calibration.
        out: written to exactly this folder, which must be empty or hold the same partial run.
        progress: told of every finished step.
        workers: layers fitted at a time; default the number of cores.
        hessians: statistics or curvature of `calibrate`, to be used instead of collecting them
            again; what is not there yet is written there and stays.
        measured: options measured for other budgets, to be used instead of fitting them again;
            new ones are written there and stay.

    Raises:
        InfeasibleBudgetError, ModelError, DataError, NumericalError, ResumeError,
        InterruptedRunError: as their names say; finished layers are kept.
    """
    started = time.monotonic()
    progress = progress or Silent()
    job = prepare(settings)
    if hessians is not None and job.curvature == "none":
        raise RecipeError(f"{settings.method} sees no data; leave out --hessians")
    if measured is not None and not job.measures_options:
        raise RecipeError(f"{settings.method} measures no options; leave out --measured")
    with PartialRun(out, job.fingerprint()) as run:
        resumed = len(run.done())
        try:
            folder = hessians or run.folder / "statistics"
            outcome = fit_all(job, run, progress, workers or os.cpu_count() or 1, folder, measured)
        except KeyboardInterrupt as error:
            raise InterruptedRunError(
                f"interrupted with {len(run.done())} of {len(job.sites)} layers finished; "
                "run the same command again to go on"
            ) from error
        container = finish(job, outcome.plan, outcome.certificate, run, outcome.notes)
    return summary_of(job, outcome, container, out, resumed, time.monotonic() - started)


def prepare(settings: Settings) -> Job:
    """Read shapes and text and check that the budget can be met; no weight is read yet."""
    job = _read(settings)
    if settings.remeasure and not job.can_remeasure:
        raise RecipeError(
            "--remeasure fits layers again under gradients of the compressed model; it needs "
            "--curvature kronecker or guided, and --targets drift-corrected"
        )
    return job


def _read(settings: Settings) -> Job:
    method = method_named(settings.method)
    path = resolve_model(settings.model)
    skeleton = Skeleton(path, computing_dtype(settings), usable_device(settings.device))
    sites = chosen_sites(sites_for(skeleton, settings), settings.ignore)
    source = SourceModel(path, frozenset(copies_of(sites)))
    budget = budget_of(settings, source, sites)
    check_ties(settings, sites)
    uniform_plan(sites, method, settings, budget)  # raises if infeasible, before any work
    if settings.targets == "drift-corrected" and method.menu is not None:
        raise RecipeError(
            f"{method.name} stores the options it has measured; "
            f"leave out {settings.targets} targets"
        )
    job = Job(settings, method, skeleton, source, sites, budget, None)
    if job.diag_hessians is not None:
        check_diagonals(job)
        return job
    images = images_for(settings, job.curvature, skeleton, sites)
    if job.curvature == "none":
        if settings.targets == "drift-corrected":
            raise RecipeError(
                f"{settings.targets} targets need calibration, and {settings.method} sees no data; "
                "choose --curvature input"
            )
        return job
    tokens = calibration_tokens(settings, skeleton)
    return Job(settings, method, skeleton, source, sites, budget, tokens, images)


def check_diagonals(job: Job) -> None:
    """Raises RecipeError for a file of diagonals that is not there or would not be looked at."""
    if job.diag_hessians is not None and not job.diag_hessians.is_file():
        raise RecipeError(f"--diag-hessians {job.diag_hessians}: no such file")
    if job.method.curvature == "none":
        raise RecipeError(f"{job.method.name} sees no data; leave out --diag-hessians")


def calibration_tokens(settings: Settings, skeleton: Skeleton) -> torch.Tensor:
    """The windows of calibration text, (samples, seqlen).

    Raises:
        RecipeError: windows longer than the model reads.
        DataError: the text cannot be read or is too short.
    """
    longest = getattr(skeleton.model.config, "max_position_embeddings", None)
    if longest is not None and settings.seqlen > longest:
        raise RecipeError(
            f"the model reads at most {longest} tokens but seqlen is {settings.seqlen}; "
            f"choose --seqlen {longest} or less"
        )
    return token_windows(
        settings.dataset,
        load_tokenizer(skeleton.path),
        settings.nsamples,
        settings.seqlen,
        settings.seed,
        allow_short=settings.allow_short,
    )


def budget_of(settings: Settings, source: SourceModel, sites: tuple[Site, ...]) -> Budget:
    """The budget in bytes, from the headers of the original's files."""
    weights = sum(site.shape[0] * site.shape[1] for site in sites)
    fixed = fixed_budget(settings, sites, method_named(settings.method))
    if fixed is not None:
        return fixed
    rest = rest_file_bytes(source, [site.name for site in sites])
    return make_budget(settings, weights, rest, source.checkpoint.stored_bytes)


def fit_all(
    job: Job,
    run: PartialRun,
    progress: Progress,
    workers: int,
    statistics: Path,
    measured: Path | None = None,
) -> Outcome:
    """Fit and store every layer that is not yet in the run.

    Args:
        statistics: where the calibration is kept.
        measured: where options are that other budgets may use.
    """
    curvatures = curvatures_of(job, statistics, progress)
    fitter = Fitter(job.skeleton, curvatures, job.settings.seed)
    compression = Compression(job, fitter, run, progress, workers, measured)
    outcome = _carried_out(compression)
    notes = {
        **curvatures.notes(),
        **outcome.notes,
        **_expected(job, outcome.certificate),
        **_together(compression),
    }
    return replace(outcome, notes=notes)


def _carried_out(compression: Compression) -> Outcome:
    method = compression.job.method
    if method.menu is not None:
        return allocate_menu(compression)
    return allocate_convex(compression) if method.allocates else _fit_uniformly(compression)


def _expected(job: Job, certificate: dict[str, Any] | None) -> dict[str, float]:
    """What the plan says of the whole, where it is in nats."""
    if certificate is None or certificate["unit"] != "nats":
        return {}
    return {"expected_kl": expected_kl(certificate["plan"]["distortion"], job.targets)}


def _together(compression: Compression) -> dict[str, Any]:
    """What all layers cost together on windows held out, where the whole model is at hand."""
    curvatures, run = gradient_curvatures(compression.fitter.curvatures), compression.run
    if curvatures is None or not curvatures.has_held_out:
        return {}
    layers = {site.name: run.get(site.name).decode() for site in compression.job.sites}
    found = curvatures.held_out_kl(layers, compression.progress)
    return {} if found is None else {"held_out_kl": asdict(found)}


def _fit_uniformly(compression: Compression) -> Outcome:
    """The method's uniform plan, every layer fitted and stored."""
    job = compression.job
    drifts = job.targets == "drift-corrected"
    if job.spends:
        return Outcome(fit_spending(compression))
    plan = uniform_plan(job.sites, job.method, job.settings, job.budget)
    if drifts and job.method.share is not None:
        raise RecipeError(
            f"{job.method.name} trains decoders for several layers at once; it cannot correct "
            "for the drift of those before them"
        )
    # Embeddings are not in any block: nothing drifts before them.
    alone = [site for site in job.sites if not drifts or isinstance(site, EmbeddingSite)]
    primed = {} if job.method.share is None else with_decoders(compression, plan.recipes)
    tasks = [Task(s.name, s, plan.recipes[s.name], primed.get(s.name)) for s in alone]
    run, progress, workers = compression.run, compression.progress, compression.workers
    fit_missing(compression.fitter, tasks, run, "layers", progress, workers)
    return Outcome(plan, notes=fit_rounds(compression, plan.recipes) if drifts else {})


def computing_dtype(settings: Settings) -> torch.dtype:
    """Of the calibration pass; "auto" is float32 on the CPU and the model's own elsewhere."""
    if settings.dtype == "auto":
        return torch.float32 if settings.device == "cpu" else torch.bfloat16
    return getattr(torch, settings.dtype)
