"""The table of `eval --tasks`: one row a model, one column a figure, from the JSON alone.

Columns name what a perplexity counts (per token in windows of so many, or per word), so that
figures of two protocols never stand in one column.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from convex_caldera.report.checked import Table
from convex_caldera.report.rows import count, fixed, shown
from convex_caldera.report.tables import MISSING, Rows

# Perplexities above this are written in powers of ten.
_LARGE = 1e5
_PERPLEXITIES = ("token_perplexity", "word_perplexity", "perplexity")


def zero_shot_rows(record: Mapping[str, Any], where: str = "eval") -> Rows:
    """The table of an evaluation with tasks; FormatError if it is not one."""
    table = Table(dict(record), where)
    tasks = table.table("tasks")
    models = table.tables("models")
    if not models:
        raise table.wrong("models", "a list with at least one model")
    columns = [
        (key, metric)
        for key in _texts(table.record.get("columns", tasks.record))
        for metric in _texts(tasks.table(key).record.get("metrics", ()))
    ]
    text = shown(table.text("text", "text"))
    headings = ["model", "file bytes", "bits per compressed weight", "bits per all weights"]
    headings += [f"KL, nats per token ({text})", f"top-1, % ({text})"]
    headings += [_heading(key, metric, tasks.table(key)) for key, metric in columns]
    cells = []
    for number, model in enumerate(models):
        row = [shown(model.text("name")), count(model.count_or_none("file_bytes"))]
        row += [fixed(model.number_or_none("bits_per_compressed_weight"), 3)]
        row += [fixed(model.number_or_none("bits_per_weight"), 3)]
        row += _fidelity(model, number == 0)
        scores = model.table("tasks")
        row += [_cell(scores.table(key).table(metric), metric) for key, metric in columns]
        cells.append(tuple(row))
    return Rows(tuple(headings), tuple(cells), 1, frozenset({0}))


def differences_rows(record: Mapping[str, Any], where: str = "eval") -> Rows | None:
    """Paired differences from the original with 95 % intervals; None if there is none."""
    lines = []
    for model in Table(dict(record), where).tables("models"):
        scores = model.table("tasks")
        for key in scores.record:
            for metric in scores.table(key).record:
                entry = scores.table(key).table(metric).table_or_none("difference")
                if entry is not None:
                    lines.append((shown(model.text("name")), key, metric, *_difference(entry)))
    if not lines:
        return None
    headings = ("model", "task", "metric", "difference, points", "95 % interval", "p", "verdict")
    return Rows(headings, tuple(lines), 3)


def _heading(key: str, metric: str, task: Table) -> str:
    name = task.text("task", key)
    if metric == "token_perplexity":
        return f"{name} ppl per token @{task.count('window')}"
    if metric == "word_perplexity":
        return f"{name} ppl per word"
    if metric == "perplexity":
        return f"{name} ppl of the last word"
    return f"{name} {metric}, %"


def _cell(entry: Table, metric: str) -> str:
    value, stderr = entry.number("value"), entry.number_or_none("stderr")
    if metric not in _PERPLEXITIES:
        error = "" if stderr is None else f" ± {100 * stderr:.2f}"
        return f"{100 * value:.2f}{error}"
    form = ".3f" if value < _LARGE else ".3g"
    return f"{value:{form}}" + ("" if stderr is None else f" ± {stderr:{form}}")


def _fidelity(model: Table, is_original: bool) -> list[str]:
    if is_original:
        return [MISSING, MISSING]
    kl, kl_error = model.number("kl"), model.number_or_none("kl_stderr")
    top, top_error = model.number("top1_agreement"), model.number_or_none("top1_stderr")
    return [
        f"{kl:.4f}" + ("" if kl_error is None else f" ± {kl_error:.4f}"),
        f"{100 * top:.2f}" + ("" if top_error is None else f" ± {100 * top_error:.2f}"),
    ]


def _difference(entry: Table) -> tuple[str, str, str, str]:
    low, high = 100 * entry.number("low"), 100 * entry.number("high")
    verdict = "worse" if high < 0 else "better" if low > 0 else "not significant"
    return (
        f"{100 * entry.number('difference'):+.2f}",
        f"{low:+.2f} to {high:+.2f}",
        f"{entry.number('p_value'):.3g}",
        verdict,
    )


def _texts(values: Any) -> Sequence[str]:
    return [value for value in values if isinstance(value, str)]
