"""One task on one model through lm-evaluation-harness, with the figures of every item kept."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from convex_caldera.errors import DataError, RecipeError
from convex_caldera.evaluate.stream_perplexity import perplexity_of
from convex_caldera.evaluate.task_files import TaskData
from convex_caldera.evaluate.task_table import Task

# The metrics that are reported, in this order; "perplexity" is that of LAMBADA's last words.
METRICS = ("acc", "acc_norm", "perplexity", "word_perplexity")


@dataclass(frozen=True)
class TaskScore:
    """One model on one task.

    Attributes:
        task: its name.
        values: metric -> value; accuracies are shares.
        stderr: metric -> standard error (None where one item says nothing).
        items: metric -> figure of every item: 0 or 1 for accuracies, nats for perplexities.
        parts: part of every item ("" where a task has no parts).
        counts: words of every item for word perplexity, else empty.
    """

    task: str
    values: dict[str, float]
    stderr: dict[str, float | None]
    items: dict[str, list[float]]
    parts: list[str]
    counts: list[int]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def require_harness() -> str:
    """The harness's version. RecipeError says how to install it where it is missing."""
    try:
        from importlib.metadata import version

        import lm_eval  # noqa: F401

        return version("lm_eval")
    except ImportError as error:
        raise RecipeError(
            "tasks need lm-evaluation-harness; install the extra: pip install "
            f"'convex-caldera[eval]' ({error})"
        ) from error


def run_task(
    name: str,
    model: nn.Module,
    tokenizer: Any,
    task: Task,
    rows: TaskData | None,
    *,
    limit: int | None = None,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TaskScore:
    """Score one task, zero-shot, with the harness's prompts, choices and metrics.

    Args:
        name: of the model, for messages.
        model, tokenizer: a transformers causal language model in evaluation mode.
        task: from the table.
        rows: its documents; None lets the harness fetch them from the hub.
        limit: items (of every part); None is all.
        batch_size: inputs at a time; None bounds the logits instead.
        progress: called with (done, total) inputs.

    Raises:
        NumericalError: NaN logits; names the first sample.
        DataError: an unknown part, or the hub has no such data.
        RecipeError: the harness is not installed.
    """
    require_harness()
    from lm_eval.evaluator import evaluate

    from convex_caldera.evaluate.harness_model import HarnessModel

    with _quiet():
        tasks = dict(_harness_tasks(task, rows, limit))
        lm = HarnessModel(name, model, tokenizer, batch_size, progress)
        result = evaluate(lm, {"tasks": tasks}, limit=limit, bootstrap_iters=0, log_samples=True)
    samples = [
        (part, sample)
        for part, harness_name in zip(_part_names(task, rows), tasks, strict=True)
        for sample in result["samples"][harness_name]
    ]
    return _score(task, samples)


def _harness_tasks(
    task: Task, rows: TaskData | None, limit: int | None
) -> Iterator[tuple[str, Any]]:
    from lm_eval.api.task import ConfigurableTask

    for part in _part_names(task, rows):
        config = _config(task, part)
        if rows is not None:
            documents = rows.parts(limit)[part]
            config |= {"dataset_path": None, "dataset_name": None, "dataset_kwargs": None}
            config |= {"custom_dataset": _data_set(documents, config), "metadata": None}
        elif task.name == "hellaswag_2way":
            raise DataError("hellaswag_2way is not on the hub; give --task-data DIR")
        yield config["task"], ConfigurableTask(config=config)


def _part_names(task: Task, rows: TaskData | None) -> list[str]:
    if task.part is None:
        return [""]
    if rows is not None:
        return list(rows.parts(None))
    folder = _tasks_folder() / str(task.config).partition("/")[0]
    return sorted(p.stem for p in folder.glob("*.yaml") if not p.stem.startswith("_"))


def _config(task: Task, part: str) -> dict[str, Any]:
    """The harness's own configuration of a task."""
    if isinstance(task.config, dict):
        return dict(task.config)
    from lm_eval.tasks._yaml_loader import load_yaml

    path = _tasks_folder() / task.config.format(part=part)
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in path.parent.glob(f"{part[:4]}*.yaml"))[:3])
        raise DataError(
            f"{task.name} has no part {part!r}" + (f"; there is {known}" if known else "")
        )
    return {k: v for k, v in load_yaml(path).items() if k not in ("tag", "group")}


def _tasks_folder() -> Path:
    import lm_eval.tasks

    return Path(lm_eval.tasks.__file__).parent


def _data_set(documents: list[dict[str, Any]], config: dict[str, Any]) -> Callable[..., Any]:
    """What the harness calls in place of a download: every split it may ask for holds the rows."""
    from datasets import Dataset, DatasetDict

    splits = [config.get(f"{kind}_split") for kind in ("training", "validation", "test")]
    rows = Dataset.from_list(documents)

    def load(**_: Any) -> Any:
        return DatasetDict({split: rows for split in splits if split is not None})

    return load


def _score(task: Task, samples: list[tuple[str, dict[str, Any]]]) -> TaskScore:
    parts = [part for part, _ in samples]
    metrics = [metric for metric in METRICS if metric in samples[0][1]["metrics"]]
    items: dict[str, list[float]] = {}
    counts: list[int] = []
    for metric in metrics:
        figures = [sample[metric] for _, sample in samples]
        if metric == "word_perplexity":
            counts = [int(words) for _, words in figures]
            figures = [-nats for nats, _ in figures]
        elif metric == "perplexity":
            figures = [-nats for nats in figures]
        items[metric] = [float(figure) for figure in figures]
    values, errors = {}, {}
    for metric, figures in items.items():
        weights = counts if metric == "word_perplexity" else [1] * len(figures)
        values[metric], errors[metric] = estimate(figures, parts, weights, metric)
    return TaskScore(task.name, values, errors, items, parts, counts)


def estimate(
    figures: list[float], parts: list[str], weights: list[int], metric: str
) -> tuple[float, float | None]:
    """Value and standard error of a metric from its items.

    Accuracies are means, of parts means of their means (each part counts alike, as in the
    harness's groups), with the textbook error sqrt(sum_k s_k^2 / n_k) / K over K parts. A
    perplexity is exp of the mean nats per word; its error is that of a ratio of sums
    (`standard_error`), times the perplexity.
    """
    import torch

    from convex_caldera.evaluate.standard_error import clustered_mean

    if metric.endswith("perplexity"):
        mean = clustered_mean(torch.tensor(figures), torch.tensor(weights))
        value = perplexity_of(mean.mean, metric)
        return value, None if mean.stderr is None else value * mean.stderr
    grouped: dict[str, list[float]] = {}
    for part, figure in zip(parts, figures, strict=True):
        grouped.setdefault(part, []).append(figure)
    tensors = [torch.tensor(g, dtype=torch.float64) for g in grouped.values()]
    value = sum(t.mean().item() for t in tensors) / len(tensors)
    if any(len(t) < 2 for t in tensors):
        return value, None
    variance = sum(t.var().item() / len(t) for t in tensors)
    return value, math.sqrt(variance) / len(tensors)


@contextmanager
def _quiet() -> Iterator[None]:
    """The harness and the library of data sets log and draw bars of their own; not meanwhile."""
    import lm_eval.api.task as drawing
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar

    logger = logging.getLogger("lm_eval")
    level, bar = logger.level, drawing.tqdm
    logger.setLevel(logging.ERROR)
    drawing.tqdm = lambda items, **_: items
    disable_progress_bar()
    try:
        yield
    finally:
        enable_progress_bar()
        drawing.tqdm = bar
        logger.setLevel(level)
