"""The main job: calibrate, plan, fit every layer, store, and assemble a model directory.

Layers are fitted side by side, each on one thread with randomness of its own, so that neither
the number of workers nor their order shows in the bytes. Every finished layer is on disk before
the next begins: a run that is cut short goes on where it stopped and ends with the same files.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from dataclasses import asdict, dataclass
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
from convex_caldera.storage.read import Container
from convex_caldera.storage.source import SourceModel
from convex_caldera.storage.write import rest_file_bytes
from convex_caldera.workflow.allocating import allocate_convex
from convex_caldera.workflow.choosing import sites_for
from convex_caldera.workflow.compression import Compression
from convex_caldera.workflow.curvatures import GRADIENT_KINDS
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
    Plan,
    check_ties,
    chosen_sites,
    fixed_budget,
    make_budget,
    uniform_plan,
)
from convex_caldera.workflow.precision import code_bits, precision_label
from convex_caldera.workflow.progress import Progress, Silent
from convex_caldera.workflow.sequential import fit_in_order
from convex_caldera.workflow.settings import Settings
from convex_caldera.workflow.spending import fit_spending


@dataclass(frozen=True)
class Summary:
    """What a compression made, measured from the files written."""

    output: str
    method: str
    file_bytes: int
    original_bytes: int
    bits_per_compressed_weight: float
    bits_per_weight: float
    compressed_weights: int
    budget_bytes: int
    layers: int
    resumed_layers: int
    whole_model_in_memory: bool
    calibration_tokens: int
    mean_relative_loss: float
    allocation: dict[str, Any] | None
    precision: str
    activations: str | None
    seconds: float
    peak_memory_bytes: int
    input_curvature_only: tuple[str, ...] = ()
    lossless_saved_bytes: int = 0
    expected_kl: float | None = None
    held_out_kl: float | None = None
    held_out_kl_stderr: float | None = None

    def to_dict(self) -> dict[str, Any]:
        record = asdict(self)
        record["num_layers"] = record.pop("layers")
        allocation = record.pop("allocation") or {}
        return {**record, **allocation}

    def text(self) -> str:
        ratio = self.original_bytes / self.file_bytes
        lines = [
            f"{self.method}: {self.layers} layers, {self.compressed_weights:,} weights"
            + (f" ({self.resumed_layers} resumed)" if self.resumed_layers else ""),
            f"{self.file_bytes:,} bytes of weight files ({ratio:.2f}x smaller), "
            f"{self.bits_per_compressed_weight:.4f} bits per compressed weight, "
            f"{self.bits_per_weight:.4f} per all weights",
            f"{self.precision}, mean relative loss {self.mean_relative_loss:.5f}, "
            f"{self.seconds:.1f} s, "
            f"peak memory {self.peak_memory_bytes / 1e6:.0f} MB -> {self.output}",
        ]
        if self.allocation is not None:
            plan, gap = self.allocation, 100 * (self.allocation["plan_gap"] or 0.0)
            lines.append(
                f"plan: predicted {plan['distortion']:.5f} {plan['unit']}, at most {gap:.3f} % "
                "above the best plan of the options measured"
            )
        if self.expected_kl is not None:
            lines.append(f"KL expected of all layers together: {self.expected_kl:.5f} nats")
        if self.held_out_kl is not None:
            error = "" if self.held_out_kl_stderr is None else f" ± {self.held_out_kl_stderr:.5f}"
            lines.append(
                f"KL on calibration windows held out: {self.held_out_kl:.5f}{error} nats per token"
            )
        if self.lossless_saved_bytes:
            lines.append(f"{self.lossless_saved_bytes:,} bytes saved on tensors kept bit for bit")
        if self.whole_model_in_memory:
            lines.append("note: the original was held whole in memory")
        if self.input_curvature_only:
            lines.append(
                f"note: gradients vanish in {len(self.input_curvature_only)} layers, which were "
                "rounded under their inputs alone"
            )
        return "\n".join(lines)


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
            plan, certificate, notes = fit_all(
                job, run, progress, workers or os.cpu_count() or 1, folder, measured
            )
        except KeyboardInterrupt as error:
            raise InterruptedRunError(
                f"interrupted with {len(run.done())} of {len(job.sites)} layers finished; "
                "run the same command again to go on"
            ) from error
        container = finish(job, plan, certificate, run, notes)
    return _summary(job, plan, certificate, container, out, resumed, time.monotonic() - started)


def prepare(settings: Settings) -> Job:
    """Read shapes and text and check that the budget can be met; no weight is read yet."""
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
) -> tuple[Plan, dict[str, Any] | None, dict[str, Any]]:
    """Fit and store every layer that is not yet in the run: plan, certificate, and notes on

    the curvature for the report. `statistics` is where the calibration is kept, `measured` where
    options are that other budgets may use.
    """
    curvatures = curvatures_of(job, statistics, progress)
    fitter = Fitter(job.skeleton, curvatures, job.settings.seed)
    compression = Compression(job, fitter, run, progress, workers, measured)
    certificate = None
    if job.method.menu is not None:
        plan, certificate = allocate_menu(compression)
    elif job.method.allocates:
        plan, certificate = allocate_convex(compression)
    else:
        plan = _fit_uniformly(compression)
    notes = {**curvatures.notes(), **_expected(job, certificate), **_together(compression)}
    return plan, certificate, notes


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


def _fit_uniformly(compression: Compression) -> Plan:
    """The method's uniform plan, every layer fitted and stored."""
    job = compression.job
    drifts = job.targets == "drift-corrected"
    if job.spends:
        return fit_spending(compression)
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
    if drifts:
        fit_in_order(compression, plan.recipes)
    return plan


def _summary(
    job: Job,
    plan: Plan,
    certificate: dict[str, Any] | None,
    container: Container,
    out: Path,
    resumed: int,
    seconds: float,
) -> Summary:
    sizes = container.sizes()
    report = container.report()
    records, together = report["layers"], report.get("held_out_kl", {})
    return Summary(
        output=str(out),
        method=job.settings.method,
        file_bytes=sizes.file_bytes,
        original_bytes=job.source.checkpoint.stored_bytes,
        bits_per_compressed_weight=sizes.bits_per_compressed_weight,
        bits_per_weight=sizes.bits_per_weight,
        lossless_saved_bytes=sizes.lossless_saved_bytes,
        compressed_weights=sizes.compressed_weights,
        budget_bytes=job.budget.compressed_bytes,
        layers=len(job.sites),
        resumed_layers=resumed,
        whole_model_in_memory=job.skeleton.whole_model or job.curvature in GRADIENT_KINDS,
        calibration_tokens=0 if job.tokens is None else job.tokens.numel(),
        mean_relative_loss=sum(r["relative_loss"] for r in records.values()) / len(records),
        allocation=None if certificate is None else _allocation_summary(certificate, records),
        precision=precision_label(map(code_bits, plan.recipes.values()), job.settings.activations),
        activations=job.settings.activations,
        seconds=seconds,
        peak_memory_bytes=peak_memory_bytes(),
        input_curvature_only=tuple(container.report().get("input_curvature_only", ())),
        expected_kl=report.get("expected_kl"),
        held_out_kl=together.get("kl"),
        held_out_kl_stderr=together.get("kl_stderr"),
    )


def _allocation_summary(certificate: dict[str, Any], records: dict[str, Any]) -> dict[str, Any]:
    """The figures of the plan that scripts rely on."""
    plan, surrogate = certificate["plan"], certificate["surrogate"]
    return {
        "plan_gap": plan["plan_gap"],
        "price": plan["price"],
        "bound": plan["bound"],
        "distortion": plan["distortion"],
        "unit": certificate["unit"],
        "surrogate_gap": surrogate["gap"] if surrogate else None,
        "layers": {
            name: {
                "bits": records[name]["bits"],
                "rank": entry["rank"],
                "price": plan["price"],
                "distortion": entry["loss"],
            }
            for name, entry in certificate["layers"].items()
        },
    }


def peak_memory_bytes() -> int:
    """Largest resident set of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def computing_dtype(settings: Settings) -> torch.dtype:
    """Of the calibration pass; "auto" is float32 on the CPU and the model's own elsewhere."""
    if settings.dtype == "auto":
        return torch.float32 if settings.device == "cpu" else torch.bfloat16
    return getattr(torch, settings.dtype)
