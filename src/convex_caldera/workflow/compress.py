"""The main job: calibrate, fit every layer as planned, store, and assemble a model directory.

One decoder block is in memory at a time; its layers are fitted side by side, each on one thread
with randomness of its own, so that neither the number of workers nor their order shows in the
bytes. Every finished layer is on disk before the next begins: a run that is cut short goes on
where it stopped and ends with the same files.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from convex_caldera.calibrate.collect import CalibratedBlock, collect
from convex_caldera.calibrate.text import fingerprint, token_windows
from convex_caldera.core.hessian import Hessian
from convex_caldera.core.problem import Problem
from convex_caldera.errors import InterruptedRunError
from convex_caldera.fit.backfit import Fit, fit_layer
from convex_caldera.models.resolve import resolve_model
from convex_caldera.models.sites import Site
from convex_caldera.models.skeleton import Skeleton
from convex_caldera.models.tokenizer import load_tokenizer
from convex_caldera.recipes.records import canonical_json, to_record
from convex_caldera.recipes.table import method as method_named
from convex_caldera.storage.card import CardFacts
from convex_caldera.storage.partial import PartialRun
from convex_caldera.storage.read import Container, Sizes
from convex_caldera.storage.source import SourceModel
from convex_caldera.storage.write import assemble, provenance_record, rest_file_bytes
from convex_caldera.workflow.planning import Budget, Plan, chosen_sites, make_budget, uniform_plan
from convex_caldera.workflow.progress import Progress, Silent
from convex_caldera.workflow.settings import Settings


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
    layers: int
    resumed_layers: int
    whole_model_in_memory: bool
    calibration_tokens: int
    mean_relative_loss: float
    seconds: float
    peak_memory_bytes: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        ratio = self.original_bytes / self.file_bytes
        lines = [
            f"{self.method}: {self.layers} layers, {self.compressed_weights:,} weights"
            + (f" ({self.resumed_layers} resumed)" if self.resumed_layers else ""),
            f"{self.file_bytes:,} bytes of weight files ({ratio:.2f}x smaller), "
            f"{self.bits_per_compressed_weight:.4f} bits per compressed weight, "
            f"{self.bits_per_weight:.4f} per all weights",
            f"mean relative loss {self.mean_relative_loss:.5f}, {self.seconds:.1f} s, "
            f"peak memory {self.peak_memory_bytes / 1e6:.0f} MB -> {self.output}",
        ]
        if self.whole_model_in_memory:
            lines.append("note: transformers converts this checkpoint; it was held whole in memory")
        return "\n".join(lines)


@dataclass(frozen=True)
class Job:
    """Everything that one run works on."""

    settings: Settings
    skeleton: Skeleton
    source: SourceModel
    sites: tuple[Site, ...]
    plan: Plan
    tokens: torch.Tensor | None

    def fingerprint(self) -> dict[str, str]:
        """What the result depends on; a partial run with another one is refused."""
        recipes = {name: to_record(recipe) for name, recipe in self.plan.recipes.items()}
        return {
            "model": self.skeleton.checkpoint.fingerprint,
            "text": "none" if self.tokens is None else fingerprint(self.tokens),
            "recipe": canonical_json({"layers": recipes, "seed": self.settings.seed}),
            "dtype": str(self.skeleton.dtype),
        }


def compress_to(
    settings: Settings,
    out: Path,
    *,
    progress: Progress | None = None,
    workers: int | None = None,
) -> Summary:
    """Compress a model into the directory `out`; resumes a run that was cut short there.

    Args:
        settings: model, method, budget and calibration.
        out: written to exactly this folder, which must be empty or hold the same partial run.
        progress: told of every finished step.
        workers: layers fitted at a time; default the number of cores.

    Raises:
        InfeasibleBudgetError, ModelError, DataError, NumericalError, ResumeError,
        InterruptedRunError: as their names say; finished layers are kept.
    """
    started = time.monotonic()
    progress = progress or Silent()
    job = prepare(settings)
    with PartialRun(out, job.fingerprint()) as run:
        resumed = len(run.done())
        try:
            fit_all(job, run, progress, workers or os.cpu_count() or 1)
        except KeyboardInterrupt as error:
            raise InterruptedRunError(
                f"interrupted with {len(run.done())} of {len(job.sites)} layers finished; "
                "run the same command again to go on"
            ) from error
        container = finish(job, run)
    return _summary(job, container, out, resumed, time.monotonic() - started)


def prepare(settings: Settings) -> Job:
    """Read shapes and text, make the plan; no weight is read yet."""
    method = method_named(settings.method)
    path = resolve_model(settings.model)
    skeleton = Skeleton(path, computing_dtype(settings), settings.device)
    source = SourceModel(path)
    sites = chosen_sites(skeleton.sites, settings.ignore)
    budget = budget_of(settings, source, sites)
    plan = uniform_plan(sites, method, settings, budget)
    tokens = None
    if method.needs_data:
        tokens = token_windows(
            settings.dataset,
            load_tokenizer(path),
            settings.nsamples,
            settings.seqlen,
            settings.seed,
            allow_short=settings.allow_short,
        )
    return Job(settings, skeleton, source, sites, plan, tokens)


def budget_of(settings: Settings, source: SourceModel, sites: tuple[Site, ...]) -> Budget:
    """The budget in bytes, from the headers of the original's files."""
    weights = sum(site.shape[0] * site.shape[1] for site in sites)
    rest = rest_file_bytes(source, [site.name for site in sites])
    return make_budget(settings, weights, rest, source.checkpoint.stored_bytes)


def fit_all(job: Job, run: PartialRun, progress: Progress, workers: int) -> None:
    """Fit and store every layer that is not yet in the run, block by block."""
    missing = [site for site in job.sites if site.name not in run.done()]
    if not missing:
        return
    progress.start("layers", len(missing))
    for block in blocks(job, {site.block for site in missing}):
        inputs = block.hessians() if job.tokens is not None else {}
        todo = [site for site in missing if site.block == block.index]
        for site, fit in fit_block(job, block, todo, inputs, workers):
            run.put(site.name, fit.layer, layer_record(job, site, fit, block))
            progress.advance(site.name)


def blocks(job: Job, wanted: set[int]) -> Iterator[CalibratedBlock]:
    """The blocks with their weights, and statistics if the method needs data."""
    if job.tokens is not None:
        with_threads = collect(job.skeleton, job.tokens, only=wanted)
        yield from _on_all_threads(with_threads)
        return
    structure = job.skeleton.structure
    for index in sorted(wanted):
        name = structure.block_name(index)
        with job.skeleton.loaded(name) as module:
            yield CalibratedBlock(index, name, module, structure.sites_of(index), {})


def fit_block(
    job: Job, block: CalibratedBlock, sites: list[Site], inputs: dict[str, Hessian], workers: int
) -> Iterator[tuple[Site, Fit]]:
    """Fit the layers of one block side by side; yields them as they finish."""

    def fit(site: Site) -> Fit:
        with _threads(1):  # the same sums whatever the number of workers
            hessian = inputs.get(site.input_site) or Hessian.identity(site.shape[1])
            problem = Problem(block.weight(site).float(), hessian, site.name)
            recipe = job.plan.recipes[site.name]
            return fit_layer(
                problem, recipe, seed=job.settings.seed, layer=site.name, site=site.input_site
            )

    largest_first = sorted(sites, key=lambda s: -s.shape[0] * s.shape[1])
    with ThreadPoolExecutor(min(workers, len(sites))) as pool:
        futures = {pool.submit(fit, site): site for site in largest_first}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def layer_record(job: Job, site: Site, fit: Fit, block: CalibratedBlock) -> dict[str, Any]:
    """One layer's entry in the report."""
    statistics = block.inputs.get(site.input_site)
    return {
        "shape": list(site.shape),
        "input_site": site.input_site,
        "stored_bytes": fit.layer.stored_bytes(),
        "bits": 8 * fit.layer.stored_bytes() / (site.shape[0] * site.shape[1]),
        "rank": fit.layer.rank,
        "loss": fit.loss,
        "relative_loss": fit.relative_loss,
        "ridge": fit.ridge,
        "dead_channels": fit.dead_channels,
        "tokens": statistics.num_tokens if statistics else 0,
        "trace": [[step.sweep, step.step, step.relative_loss] for step in fit.trace],
        "recipe": to_record(job.plan.recipes[site.name]),
    }


def finish(job: Job, run: PartialRun) -> Container:
    """Assemble the model directory from a complete run."""
    names = [site.name for site in job.sites]
    settings = job.settings.published()
    return assemble(
        run,
        job.source,
        names,
        recipe={"run": settings},
        report={
            "method": job.settings.method,
            "budget_bytes": job.plan.budget.compressed_bytes if job.plan.budget else None,
            "budget": job.plan.budget.wording if job.plan.budget else "",
            "whole_model_in_memory": job.skeleton.whole_model,
            "layers": {name: run.record(name) for name in names},
        },
        provenance=provenance_record(
            job.source, settings=settings, fingerprint=_short(job.fingerprint())
        ),
        card=CardFacts(
            base_model=settings["model"],
            method=job.settings.method,
            command=_command(settings),
            calibration=_calibration_sentence(job),
        ),
    )


def _summary(job: Job, container: Container, out: Path, resumed: int, seconds: float) -> Summary:
    sizes: Sizes = container.sizes()
    records = container.report()["layers"].values()
    return Summary(
        output=str(out),
        method=job.settings.method,
        file_bytes=sizes.file_bytes,
        original_bytes=job.source.checkpoint.stored_bytes,
        bits_per_compressed_weight=sizes.bits_per_compressed_weight,
        bits_per_weight=sizes.bits_per_weight,
        compressed_weights=sizes.compressed_weights,
        layers=len(job.sites),
        resumed_layers=resumed,
        whole_model_in_memory=job.skeleton.whole_model,
        calibration_tokens=0 if job.tokens is None else job.tokens.numel(),
        mean_relative_loss=sum(r["relative_loss"] for r in records) / len(job.sites),
        seconds=seconds,
        peak_memory_bytes=peak_memory_bytes(),
    )


def peak_memory_bytes() -> int:
    """Largest resident set of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def computing_dtype(settings: Settings) -> torch.dtype:
    """Of the calibration pass; "auto" is float32 on the CPU and the model's own elsewhere."""
    if settings.dtype == "auto":
        return torch.float32 if settings.device == "cpu" else torch.bfloat16
    return getattr(torch, settings.dtype)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """torch's own threads for the work inside; they are a property of the calling thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _on_all_threads(calibrated: Iterator[CalibratedBlock]) -> Iterator[CalibratedBlock]:
    """Calibrate with a fixed number of threads, whatever the workers set in between."""
    count = torch.get_num_threads()
    while True:
        torch.set_num_threads(count)
        block = next(calibrated, None)
        if block is None:
            return
        yield block


def _short(fingerprint_: dict[str, str]) -> dict[str, str]:
    import hashlib

    return {k: hashlib.sha256(v.encode()).hexdigest() for k, v in fingerprint_.items()}


def _command(settings: dict[str, Any]) -> str:
    parts = ["convex-caldera compress", str(settings["model"]), "-o OUT"]
    for key, value in settings.items():
        if key == "model" or key not in Settings.model_fields:
            continue
        if value == Settings.model_fields[key].default:
            continue
        flag = "--" + key.replace("_", "-")
        if isinstance(value, bool):
            parts.append(flag)
        elif isinstance(value, (tuple, list)):
            parts += [f"{flag} {item}" for item in value]
        else:
            parts.append(f"{flag} {value}")
    return " ".join(parts)


def _calibration_sentence(job: Job) -> str:
    if job.tokens is None:
        return "No calibration data: the method needs none."
    dataset = job.settings.published()["dataset"]
    return f"{job.tokens.numel()} tokens of {dataset} in windows of {job.tokens.shape[1]}."
