"""A compression in stages, each with its result on disk: LQER's pipeline, resumable.

    profile       OUT/profile/                 statistics of every layer input
    approximate   OUT/approximate/chunk_...    layers, fitted and stored one by one
    quantize      OUT/model/                   the model directory
    perplexity    OUT/perplexity.json          beside the original
    downstream    OUT/downstream.json          zero-shot tasks

A stage that is done is not done again; one that was cut short goes on after the last layer. A
chunk is a slice of the list of layers and may be made by another process: all chunks done, in
any order, `quantize` puts them together.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convex_caldera.errors import InterruptedRunError, RecipeError, ResumeError
from convex_caldera.models.sites import Site
from convex_caldera.recipes.records import canonical_json, to_toml
from convex_caldera.storage.files import write_atomically
from convex_caldera.storage.manifest import MANIFEST
from convex_caldera.storage.partial import PARTIAL, PartialRun
from convex_caldera.storage.read import open_container
from convex_caldera.workflow.calibrating import calibrate_to
from convex_caldera.workflow.compress import prepare
from convex_caldera.workflow.curvatures import Curvatures
from convex_caldera.workflow.evaluating import evaluate_models
from convex_caldera.workflow.finishing import finish
from convex_caldera.workflow.fitting import Fitter, Task, fit_missing
from convex_caldera.workflow.gathering import curvatures_of
from convex_caldera.workflow.job import Job
from convex_caldera.workflow.planning import Plan, uniform_plan
from convex_caldera.workflow.precision import code_bits, precision_label
from convex_caldera.workflow.progress import Progress, Silent
from convex_caldera.workflow.settings import Settings
from convex_caldera.workflow.stage_config import (
    DATASETS,
    check_patterns,
    settings_of,
)
from convex_caldera.workflow.stage_schema import StagedConfig

STAGES = ("profile", "approximate", "quantize", "perplexity", "downstream")
RECORD = "stages.json"


@dataclass(frozen=True)
class Stages:
    """One configuration carried out in one folder.

    Args:
        config: checked, see `stage_config.make_config`.
        out: folder of all stages.
        profile: folder of the statistics, where several runs share them; default OUT/profile.
        progress: told of every step.
        workers: layers fitted at a time; does not change the result.
    """

    config: StagedConfig
    out: Path
    profile: Path | None = None
    progress: Progress | None = None
    workers: int | None = None

    def run(self) -> dict[str, Any]:
        """Carry out every stage that is enabled and not done; results by stage.

        Raises:
            ResumeError: the folder holds another configuration, and overwrite_checkpoint is off.
            RecipeError: a stage needs an earlier one that is neither enabled nor done.
            Any error of the stages themselves; what is finished stays.
        """
        settings = settings_of(self.config)
        record = self._opened(settings)
        for name, enabled in self._enabled().items():
            options = self._options(name)
            if not enabled or record["results"].get(name, {}).get("options", ...) == options:
                continue
            started = time.monotonic()
            try:
                result = self._stage(name)(settings)
            except KeyboardInterrupt as error:
                raise InterruptedRunError(
                    f"interrupted in the stage {name}; run the same command again to go on"
                ) from error
            if result is None:  # a chunk of several
                break
            seconds = time.monotonic() - started
            record["results"][name] = {**result, "options": options, "seconds": seconds}
            self._write(RECORD, record)
        return {name: record["results"][name] for name in STAGES if name in record["results"]}

    def _options(self, name: str) -> dict[str, Any]:
        """What a stage depends on beyond the settings; it is done again if this changes."""
        evaluate = self.config.evaluate
        chosen = {"perplexity": evaluate.perplexity, "downstream": evaluate.harness_downstream}
        options = chosen.get(name)
        return {} if options is None else {**options.model_dump(mode="json"), "on": evaluate.device}

    def _enabled(self) -> dict[str, bool]:
        config = self.config
        flags = (
            config.enable_profiling,
            config.enable_approximation,
            config.enable_quantization and config.enable_approximation,
            config.enable_perplexity_evaluation,
            config.enable_harness_downstream_evaluation,
        )
        return dict(zip(STAGES, flags, strict=True))

    def _stage(self, name: str) -> Callable[[Settings], dict[str, Any] | None]:
        return {
            "profile": self._profile,
            "approximate": self._approximate,
            "quantize": self._quantize,
            "perplexity": self._perplexity,
            "downstream": self._downstream,
        }[name]

    # --- the folder -------------------------------------------------------------------------

    def _opened(self, settings: Settings) -> dict[str, Any]:
        """What is done here already, if it is of this configuration."""
        text = canonical_json(settings.model_dump(mode="json"))
        fingerprint = hashlib.sha256(text.encode()).hexdigest()
        empty = {"fingerprint": fingerprint, "results": {}}
        path = self.out / RECORD
        if path.is_file():
            found = _read_record(path)
            if found["fingerprint"] == fingerprint:
                return found
            if not self.config.overwrite_checkpoint:
                raise ResumeError(
                    f"{self.out} holds the stages of another configuration; choose another "
                    "folder, or set overwrite_checkpoint = true"
                )
            shutil.rmtree(self.out)
        elif self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise ResumeError(f"{self.out} is not empty and holds no stages; choose another folder")
        self.out.mkdir(parents=True, exist_ok=True)
        self._write(RECORD, empty)
        config = self.config.model_dump(mode="json", exclude_none=True)
        write_atomically(self.out / "config.toml", [to_toml(config).encode()])
        return empty

    def _write(self, name: str, value: Any) -> None:
        text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n"
        write_atomically(self.out / name, [text.encode()])

    @property
    def _statistics(self) -> Path:
        return self.profile or self.out / "profile"

    @property
    def _model(self) -> Path:
        return self.out / "model"

    # --- stages -----------------------------------------------------------------------------

    def _profile(self, settings: Settings) -> dict[str, Any]:
        """Statistics of every input; nothing where the method sees no data."""
        job = prepare(settings)
        if job.curvature == "none":
            return {"tokens": 0, "sites": 0}
        found = calibrate_to(settings, self._statistics, progress=self.progress)
        return {key: found[key] for key in ("tokens", "sites")}

    def _approximate(self, settings: Settings) -> dict[str, Any] | None:
        """Fit the layers of this chunk, or all; None while other chunks are missing."""
        job = prepare(settings)
        check_patterns(self.config, [site.name for site in job.sites])
        plan = uniform_plan(job.sites, job.method, settings, job.budget)
        chunks = self._chunks(job.sites)
        index = self.config.approximate.chunk_idx
        if index is not None and index >= len(chunks):
            raise RecipeError(
                f"approximate.chunk_idx = {index}, but approximate.chunk_size = "
                f"{self.config.approximate.chunk_size} makes {len(chunks)} chunks of "
                f"{len(job.sites)} layers"
            )
        for i in range(len(chunks)) if index is None else [index]:
            self._fit_chunk(job, plan, chunks[i], self._chunk_folder(i, len(chunks)))
        missing = [
            i
            for i in range(len(chunks))
            if not self._chunk_done(job, chunks[i], self._chunk_folder(i, len(chunks)))
        ]
        if missing:
            return None
        bits = precision_label(map(code_bits, plan.recipes.values()), settings.activations)
        return {"layers": len(job.sites), "chunks": len(chunks), "precision": bits}

    def _quantize(self, settings: Settings) -> dict[str, Any]:
        """Put all chunks together in a model directory, and drop them."""
        if not (self._model / MANIFEST).is_file():
            job = prepare(settings)
            plan = uniform_plan(job.sites, job.method, settings, job.budget)
            with PartialRun(self._model, job.fingerprint()) as run:
                chunks = self._chunks(job.sites)
                for i, sites in enumerate(chunks):
                    self._merge(job, sites, self._chunk_folder(i, len(chunks)), run)
                finish(job, plan, None, run, {})
        for spare in (self._model / PARTIAL, self.out / "approximate"):
            shutil.rmtree(spare, ignore_errors=True)
        container = open_container(self._model)
        sizes = container.sizes()
        layers = container.report()["layers"].values()
        return {
            "output": self._model.name,
            "file_bytes": sizes.file_bytes,
            "bits_per_compressed_weight": sizes.bits_per_compressed_weight,
            "bits_per_weight": sizes.bits_per_weight,
            "mean_relative_loss": sum(r["relative_loss"] for r in layers) / len(layers),
            "activations": settings.activations,
        }

    def _perplexity(self, settings: Settings) -> dict[str, Any]:
        options = self.config.evaluate.perplexity
        if options is None:
            raise RecipeError(
                "enable_perplexity_evaluation is true, but evaluate.perplexity is missing"
            )
        tokens = options.num_samples and options.num_samples * options.max_length
        result = evaluate_models(
            self._pair(settings),
            DATASETS.get(options.dataset, options.dataset),
            window=options.max_length,
            stride=options.stride,
            bos=options.bos,
            max_tokens=tokens,
            device=self.config.evaluate.device,
            progress=self.progress,
        )
        self._write("perplexity.json", result.to_dict())
        original, compressed = result.to_dict()["models"]
        return {
            "perplexity": compressed["perplexity"],
            "perplexity_stderr": compressed["perplexity_stderr"],
            "original_perplexity": original["perplexity"],
            "kl": compressed["kl"],
            "kl_stderr": compressed["kl_stderr"],
        }

    def _downstream(self, settings: Settings) -> dict[str, Any]:
        options = self.config.evaluate.harness_downstream
        assert options is not None  # checked with the configuration
        record = run_tasks(
            self._pair(settings), options.model_dump(), self.out, self.config.evaluate.device
        )
        self._write("downstream.json", record)
        return {"tasks": record["models"][-1]["tasks"]}

    def _pair(self, settings: Settings) -> list[str]:
        """The original and what was made of it."""
        if not (self._model / MANIFEST).is_file():
            raise RecipeError(
                f"{self._model} is missing: run the stages approximate and quantize first"
            )
        return [settings.model, str(self._model)]

    # --- chunks -----------------------------------------------------------------------------

    def _chunks(self, sites: Sequence[Site]) -> list[Sequence[Site]]:
        size = self.config.approximate.chunk_size or len(sites)
        return [sites[i : i + size] for i in range(0, len(sites), size)]

    def _chunk_folder(self, index: int, count: int) -> Path:
        return self.out / "approximate" / f"chunk_{index}_of_{count}"

    def _chunk_done(self, job: Job, sites: Sequence[Site], folder: Path) -> bool:
        if not (folder / PARTIAL).is_dir():
            return False
        with PartialRun(folder, job.fingerprint()) as run:
            return {site.name for site in sites} <= run.done()

    def _fit_chunk(self, job: Job, plan: Plan, sites: Sequence[Site], folder: Path) -> None:
        """Fit what is missing of a chunk."""
        with PartialRun(folder, job.fingerprint()) as run:
            missing = [site for site in sites if site.name not in run.done()]
            if not missing:
                return
            progress = self.progress or Silent()
            fitter = Fitter(job.skeleton, self._curvatures(job, progress), job.settings.seed)
            tasks = [Task(site.name, site, plan.recipes[site.name]) for site in missing]
            workers = self.workers or os.cpu_count() or 1
            fit_missing(fitter, tasks, run, f"approximate {folder.name}", progress, workers)

    def _curvatures(self, job: Job, progress: Progress) -> Curvatures:
        if job.curvature != "none" and not self._statistics.is_dir():
            raise RecipeError(
                f"{self._statistics} is missing: {job.method.name} sees data; set "
                "enable_profiling = true"
            )
        return curvatures_of(job, self._statistics, progress)

    def _merge(self, job: Job, sites: Sequence[Site], folder: Path, run: PartialRun) -> None:
        """Copy the layers of a chunk that are not there yet."""
        missing = [site.name for site in sites if site.name not in run.done()]
        if not missing:
            return
        if not (folder / PARTIAL).is_dir():
            raise RecipeError(f"{folder.name} is missing: run the stage approximate for it")
        with PartialRun(folder, job.fingerprint()) as chunk:
            for name in missing:
                run.put(name, chunk.get(name), chunk.record(name))


def _read_record(path: Path) -> dict[str, Any]:
    """stages.json. Raises ResumeError if it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ResumeError(
            f"{path} is damaged ({error}); remove the folder and begin anew"
        ) from error
    if not isinstance(found, dict) or set(found) != {"fingerprint", "results"}:
        raise ResumeError(f"{path} is not a record of stages; remove the folder and begin anew")
    return found


def run_tasks(
    names: list[str], options: dict[str, Any], folder: Path, device: str
) -> dict[str, Any]:
    """Zero-shot tasks of the models, the original first.

    Raises:
        RecipeError: what runs tasks is not installed; names the extra.
    """
    try:
        from convex_caldera.workflow.zero_shot import TaskOptions, evaluate_tasks
    except ImportError as error:
        raise RecipeError(
            f"zero-shot tasks need the extra `eval` ({error}); install it with: "
            'pip install "convex-caldera[eval]"'
        ) from error
    chosen = TaskOptions(
        tasks=tuple(options["datasets"]),
        task_data=tuple(options["task_data"]),
        limit=options["limit"],
        batch_size=options["batch_size"],
    )
    return evaluate_tasks(names, chosen, output_dir=folder / "downstream", device=device)
