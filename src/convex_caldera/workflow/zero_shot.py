"""Models by name on tasks: the original first, one candidate in memory at a time, resumable.

Every (model, task) that is finished is a file of its own below the output folder; a run that was
cut short goes on after the last one. A part is taken up again only if model, data, limit, protocol
and versions are those that made it.
"""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from convex_caldera.calibrate.text import read_text
from convex_caldera.errors import RecipeError
from convex_caldera.evaluate.bootstrap import paired_bootstrap
from convex_caldera.evaluate.compare import Candidate, evaluate
from convex_caldera.evaluate.harness import require_harness, run_task
from convex_caldera.evaluate.stream_perplexity import (
    C4_WINDOWS,
    stream_perplexity,
    stream_text,
)
from convex_caldera.evaluate.task_files import TaskData, find_file, parse_sources, read_task
from convex_caldera.evaluate.task_table import Task, task_named
from convex_caldera.models.tokenizer import load_tokenizer
from convex_caldera.storage.files import sha256_of, write_atomically
from convex_caldera.workflow.models import ModelRef, open_model
from convex_caldera.workflow.progress import Progress, Silent

HUB = "hub"
SCHEMA = 1
Perplexity = Literal["token", "word", "both"]
PROTOCOLS: dict[str, tuple[str, ...]] = {
    "token": ("token",),
    "word": ("word",),
    "both": ("token", "word"),
}


@dataclass(frozen=True)
class TaskOptions:
    """How tasks are scored; all of it is part of what a finished part must agree with.

    Attributes:
        tasks: names, in the order of the table's columns.
        task_data: folders and TASK=FILE; or `hub`, which lets the harness fetch data.
        limit: items per task (of every part; documents or windows for perplexities).
        protocol: perplexity per "token" (papers), "word" (lm-evaluation-harness), or "both".
        batch_size: inputs at a time, None bounds memory instead.
        text, window, stride, bos, max_tokens: of KL and agreement, as in `evaluate_models`.
    """

    tasks: tuple[str, ...]
    task_data: tuple[str, ...] = ()
    limit: int | None = None
    protocol: str = "token"
    batch_size: int | None = None
    text: str = "bundled:test"
    window: int = 512
    stride: int | None = None
    bos: bool = True
    max_tokens: int | None = None


@dataclass(frozen=True)
class Unit:
    """One column group: a task under one protocol ("" for those with accuracies)."""

    task: Task
    rows: TaskData | None
    protocol: str

    @property
    def key(self) -> str:
        return f"{self.task.name}-{self.protocol}" if self.protocol else self.task.name


@dataclass
class _Loaded:
    """At most the original and one candidate, loaded when first needed."""

    device: str
    models: dict[str, Any] = field(default_factory=dict)

    def get(self, ref: ModelRef) -> Any:
        if ref.name not in self.models:
            self.models[ref.name] = ref.load(self.device)
        return self.models[ref.name]

    def keep_only(self, name: str) -> None:
        self.models = {k: v for k, v in self.models.items() if k == name}
        gc.collect()


def evaluate_tasks(
    names: Sequence[str],
    options: TaskOptions,
    *,
    output_dir: Path | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Scores of every model on every task, as plain data.

    Args:
        names: the original first, then what was made of it.
        options: tasks and how they are scored.
        output_dir: where finished parts are kept, to be resumed from.
        device: where models run.
        progress: told of every batch.

    Returns:
        The JSON of `eval`: models (sizes, perplexity, KL, agreement, and `tasks`: value, standard
        error and paired difference from the original by metric), protocol, tasks, options.

    Raises:
        RecipeError: an unknown task or option, or the first model is compressed.
        DataError: a task's file is missing or malformed.
        NumericalError: NaN logits; names model, task and sample.

    Cost: one pass of every model over every task. Memory: the original and one candidate, and
    logits of one batch.
    """
    models = [open_model(name) for name in names]
    _check(models, options)
    units = make_units(options)
    parts = _Parts(output_dir, options, progress or Silent())
    loaded = _Loaded(device)
    tokenizer = load_tokenizer(models[0].path)
    records = []
    for model in models:
        record = parts.made(model, "text", lambda m=model: _fidelity(models[0], m, options, loaded))
        record["tasks"] = {
            unit.key: parts.made(
                model,
                unit.key,
                lambda m=model, u=unit: _scored(m, u, tokenizer, options, loaded, parts),
                unit,
            )
            for unit in units
        }
        records.append(record)
        loaded.keep_only(models[0].name)
    return _assembled(models, records, units, options)


def make_units(options: TaskOptions) -> list[Unit]:
    """Tasks with their data read and checked, before any model is loaded."""
    tasks = [task_named(name) for name in dict.fromkeys(options.tasks)]
    hub = HUB in options.task_data
    folders, files = parse_sources([s for s in options.task_data if s != HUB])
    units = []
    for task in tasks:
        rows = (
            None
            if hub and task.name not in files
            else read_task(task, find_file(task, folders, files))
        )
        protocols = PROTOCOLS[options.protocol] if task.kind == "text" else ("",)
        if rows is None and "token" in protocols:
            raise RecipeError(
                f"{task.name} per token reads a local file; give --task-data {task.name}=FILE, "
                "or --protocol word"
            )
        units += [Unit(task, rows, protocol) for protocol in protocols]
    return units


class _Parts:
    """Finished (model, unit) records, in memory or below a folder."""

    def __init__(self, folder: Path | None, options: TaskOptions, progress: Progress):
        self._folder = None if folder is None else folder / "parts"
        self._options, self.progress = options, progress
        self._hashes: dict[str, str] = {}

    def made(
        self,
        model: ModelRef,
        key: str,
        make: Callable[[], dict[str, Any]],
        unit: Unit | None = None,
    ) -> dict[str, Any]:
        """The record, read if it was finished by an equal run, else made and written."""
        if self._folder is None:
            return make()
        print_of = self._fingerprint(model, key, unit)
        path = self._folder / f"{print_of[:16]}.json"
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            if found.get("fingerprint") == print_of:
                return found["record"]
        record = make()
        content = {"fingerprint": print_of, "model": model.name, "part": key, "record": record}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, [(json.dumps(content) + "\n").encode()])
        return record

    def stage(self, title: str) -> Callable[[int, int], None]:
        """(done, total) -> steps of a progress stage."""
        state = {"done": 0}

        def report(done: int, total: int) -> None:
            if state["done"] == 0:
                self.progress.start(title, total)
            for _ in range(done - state["done"]):
                self.progress.advance()
            state["done"] = done

        return report

    def _fingerprint(self, model: ModelRef, key: str, unit: Unit | None) -> str:
        data = unit.rows.sha256 if unit is not None and unit.rows is not None else ""
        options = {
            k: v for k, v in asdict(self._options).items() if k not in ("tasks", "task_data")
        }
        content = [SCHEMA, self._model_hash(model), key, data, options, _versions()]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def _model_hash(self, model: ModelRef) -> str:
        if model.name not in self._hashes:
            files = sorted(p for p in model.path.iterdir() if p.suffix in (".safetensors", ".json"))
            lines = [f"{p.name} {sha256_of(p)}" for p in files]
            self._hashes[model.name] = hashlib.sha256("\n".join(lines).encode()).hexdigest()
        return self._hashes[model.name]


def _fidelity(
    original: ModelRef, model: ModelRef, options: TaskOptions, loaded: _Loaded
) -> dict[str, Any]:
    """Perplexity in windows, KL and agreement with the original: `evaluate` on a pair."""
    pair = [original] if model is original else [original, model]
    candidates = [
        Candidate(m.name, lambda m=m: loaded.get(m), m.file_bytes, m.bits_per_compressed_weight)
        for m in pair
    ]
    result = evaluate(
        candidates,
        read_text(options.text),
        load_tokenizer(original.path),
        window=options.window,
        stride=options.stride,
        bos=options.bos,
        max_tokens=options.max_tokens,
        batch_size=options.batch_size,
    )
    record = result.to_dict()
    return {
        **record["models"][-1],
        "bits_per_weight": model.bits_per_weight,
        "compressed": model.compressed,
        "activations": model.activations,
        "protocol": record["protocol"],
    }


def _scored(
    model: ModelRef,
    unit: Unit,
    tokenizer: Any,
    options: TaskOptions,
    loaded: _Loaded,
    parts: _Parts,
) -> dict[str, Any]:
    report = parts.stage(f"{model.name}: {unit.key}")
    if unit.protocol != "token":
        return run_task(
            model.name, loaded.get(model), tokenizer, unit.task, unit.rows,
            limit=options.limit, batch_size=options.batch_size, progress=report,
        ).to_dict()  # fmt: skip
    assert unit.rows is not None
    limit = options.limit
    if unit.task.name == "c4":
        limit = min(limit or C4_WINDOWS, C4_WINDOWS)
    score = stream_perplexity(
        model.name, loaded.get(model), tokenizer,
        stream_text(unit.task.name, unit.rows.documents),
        window=options.window, limit=limit, batch_size=options.batch_size, progress=report,
    )  # fmt: skip
    return {
        "task": unit.task.name,
        "values": {"token_perplexity": score.perplexity},
        "stderr": {"token_perplexity": score.stderr},
        "items": {"token_perplexity": score.window_nats},
        "parts": [""] * len(score.window_nats),
        "counts": [],
    }


def _assembled(
    models: list[ModelRef], records: list[dict[str, Any]], units: list[Unit], options: TaskOptions
) -> dict[str, Any]:
    """One record of all models; items are reduced to differences from the original."""
    original = records[0]
    protocol = original["protocol"]
    entries = []
    for record in records:
        tasks = {
            key: _with_difference(score, original["tasks"][key], record is original)
            for key, score in record["tasks"].items()
        }
        rest = {k: v for k, v in record.items() if k != "protocol"}
        entries.append({**rest, "tasks": tasks})
    for entry, model in zip(entries, models, strict=True):
        entry["name"] = model.name
    return {
        "schema": SCHEMA,
        "models": entries,
        "protocol": protocol,
        "text": options.text,
        "columns": [unit.key for unit in units],
        "tasks": {unit.key: _described(unit, options, entries[0]) for unit in units},
        "options": asdict(options),
        "versions": _versions(),
    }


def _with_difference(
    score: dict[str, Any], original: dict[str, Any], is_original: bool
) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for metric, value in score["values"].items():
        entry = {"value": value, "stderr": score["stderr"][metric]}
        if not is_original and "perplexity" not in metric:
            pair = paired_bootstrap(
                score["items"][metric], original["items"][metric], score["parts"]
            )
            entry["difference"] = pair.to_dict()
        figures[metric] = entry
    return figures


def _described(unit: Unit, options: TaskOptions, entry: dict[str, Any]) -> dict[str, Any]:
    """What a column says: protocol, window, items, file."""
    return {
        "task": unit.task.name,
        "kind": unit.task.kind,
        "protocol": unit.protocol,
        "window": options.window if unit.protocol == "token" else None,
        "limit": options.limit,
        "metrics": list(entry["tasks"][unit.key]),
        "file": None if unit.rows is None else unit.rows.file,
        "sha256": None if unit.rows is None else unit.rows.sha256,
        "documents": None if unit.rows is None else len(unit.rows.documents),
    }


def _versions() -> dict[str, str]:
    require_harness()
    return {name: version(name) for name in ("torch", "transformers", "lm_eval")}


def _check(models: list[ModelRef], options: TaskOptions) -> None:
    if not models or len({m.name for m in models}) < len(models):
        raise RecipeError(
            f"evaluation needs models of different names, got {[m.name for m in models]}"
        )
    if models[0].compressed and len(models) > 1:
        raise RecipeError(f"{models[0].name} is compressed; name the original model first")
    if options.protocol not in PROTOCOLS:
        raise RecipeError(f"protocol {options.protocol!r} is none of {', '.join(PROTOCOLS)}")
    if options.limit is not None and options.limit < 1:
        raise RecipeError(f"limit must be at least 1, got {options.limit}")
    require_harness()
