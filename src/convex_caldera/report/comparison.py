"""The mission's two tables over many runs: zero-shot evaluation, and efficiency with certificates.

They stand at the top of the report's page and beside it in four forms. A cell says what was
measured or nothing: a column for which no task was scored is left out, and perplexities name
their protocol.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from convex_caldera.errors import FormatError
from convex_caldera.report.checked import Table, read_table
from convex_caldera.report.read import read_run
from convex_caldera.report.rows import fixed, shown
from convex_caldera.report.run import Run
from convex_caldera.report.tables import MISSING, RENDERERS, Rows, html_table
from convex_caldera.report.write import PAGE, write_report
from convex_caldera.storage.files import write_atomically

# Column of the mission's table -> (task, metric), in its order; the first that was scored counts.
MISSION_COLUMNS: dict[str, tuple[tuple[str, str], ...]] = {
    "Wiki2": (("wikitext2", "token_perplexity"), ("wikitext2", "word_perplexity")),
    "C4": (("c4", "token_perplexity"), ("c4", "word_perplexity")),
    "Wino": (("winogrande", "acc"),),
    "RTE": (("rte", "acc"),),
    "PiQA": (("piqa", "acc"),),
    "ArcC": (("arc_challenge", "acc"),),
}
_ANCHOR = '<h2 id="results">'


@dataclass(frozen=True)
class Checked:
    """What the independent checker said of a run."""

    ok: bool
    sentence: str


@dataclass(frozen=True)
class _Column:
    """A figure of one evaluation, by number, and what stands above it."""

    record: int
    key: str
    metric: str
    heading: str


def write_comparison(
    outs: Sequence[Path],
    target: Path,
    evaluations: Iterable[Path] = (),
    checked: Mapping[Path, Checked] | None = None,
) -> list[Path]:
    """The report over many runs, with the mission's two tables in front and beside it.

    Args:
        outs: output directories of `compress`.
        target: a folder.
        evaluations: JSON files of `convex-caldera eval`, with tasks or without.
        checked: verdict of the checker by directory; None where it was not run.

    Returns:
        The files written: those of `write_report`, and mission-{zero-shot,efficiency}.*.

    Raises:
        DataError, FormatError, RecipeError: as `write_report`.
    """
    files = [Path(path) for path in evaluations]
    written = write_report(list(outs), target, files)
    records = [read_table(path) for path in files]
    with_tasks = [table for table in records if table.record.get("tasks")]
    tables = {"efficiency": efficiency_table([read_run(out) for out in outs], checked or {})}
    if with_tasks:
        tables = {"zero-shot": zero_shot_table(with_tasks), **tables}
    captions = {"zero-shot": "Zero-shot evaluation", "efficiency": "Compression efficiency"}
    html = ""
    for name, rows in tables.items():
        for suffix, render in RENDERERS.items():
            path = target / f"mission-{name}.{suffix}"
            write_atomically(path, [render(rows).encode()])
            written.append(path)
        html += html_table(rows, "cards", captions[name]) + "\n"
    _put_in_front(target / PAGE, html, outs, files)
    return written


def zero_shot_table(records: Sequence[Table]) -> Rows:
    """Method, average bits over all weights, and the mission's columns; the original first."""
    columns = [column for name in MISSION_COLUMNS if (column := _column(name, records))]
    models: dict[str, list[Table | None]] = {}
    for number, record in enumerate(records):
        for model in record.tables("models"):
            models.setdefault(model.text("name"), [None] * len(records))[number] = model
    cells = []
    for name, found in models.items():
        known = next(model for model in found if model is not None)
        row = [shown(name), fixed(known.number_or_none("bits_per_weight"), 2)]
        row += [_score(found[c.record], c.key, c.metric) for c in columns]
        cells.append(tuple(row))
    headings = ("Method", "Avg Bits (all weights) ↓", *(c.heading for c in columns))
    return Rows(headings, tuple(cells), 1, frozenset({0}))


def efficiency_table(runs: Sequence[Run], checked: Mapping[Path, Checked]) -> Rows:
    """Model, method, average bits, ranks stored, and what is certified."""
    headings = (
        "Model", "Method", "Avg Bits (compressed weights) ↓", "Avg Bits (all weights) ↓",
        "Rank, mean (least-greatest) ↓", "Certificate", "Checked",
    )  # fmt: skip
    cells = []
    for run in runs:
        ranks = [layer.rank for layer in run.layers]
        sizes = run.sizes
        verdict = checked.get(run.directory)
        cells.append(
            (
                shown(str(run.settings.get("model", MISSING))),
                f"{run.method} ({run.title})",
                fixed(None if sizes is None else sizes.bits_per_compressed_weight, 3),
                fixed(None if sizes is None else sizes.bits_per_weight, 3),
                f"{sum(ranks) / len(ranks):.1f} ({min(ranks)}-{max(ranks)})",
                _certificate(run),
                MISSING if verdict is None else verdict.sentence,
            )
        )
    return Rows(headings, tuple(cells), 2)


def _column(name: str, records: Sequence[Table]) -> _Column | None:
    """The first evaluation that scored what the column shows, in the first protocol that did."""
    for task, metric in MISSION_COLUMNS[name]:
        for number, record in enumerate(records):
            tasks = record.table("tasks")
            key = _scored_key(tasks, task, metric)
            if key is not None:
                return _Column(number, key, metric, _heading(name, metric, tasks.table(key)))
    return None


def _scored_key(tasks: Table, task: str, metric: str) -> str | None:
    for key in tasks.record:
        entry = tasks.table(key)
        if entry.text("task", key) == task and metric in entry.record.get("metrics", ()):
            return key
    return None


def _heading(name: str, metric: str, task: Table) -> str:
    if metric == "token_perplexity":
        return f"{name} (ppl per token @{task.count('window')}) ↓"
    if metric == "word_perplexity":
        return f"{name} (ppl per word) ↓"
    return f"{name} ↑"


def _score(model: Table | None, key: str, metric: str) -> str:
    if model is None or key not in model.table("tasks").record:
        return MISSING
    entry = model.table("tasks").table(key).table(metric)
    value, error = entry.number("value"), entry.number_or_none("stderr")
    scale, digits = (1, 2) if "perplexity" in metric else (100, 1)
    shown_error = "" if error is None else f" ± {scale * error:.{digits}f}"
    return f"{scale * value:.{digits}f}{shown_error}"


def _certificate(run: Run) -> str:
    c = run.certificate
    if c is None:
        return "none (one recipe for all layers)"
    gap = MISSING if c.plan_gap is None else f"{100 * c.plan_gap:.3g} %"
    return f"plan gap {gap}"


def _put_in_front(page: Path, html: str, outs: Sequence[Path], files: Sequence[Path]) -> None:
    """Insert the tables before the page's own results, with the command that made them."""
    text = page.read_text(encoding="utf-8")
    if text.count(_ANCHOR) != 1:
        raise FormatError(f"{page}: has no place for the comparison before its results")
    names = [*(str(out) for out in outs), *(f"--eval {file}" for file in files)]
    command = escape(f"convex-caldera compare {' '.join(names)}")
    section = f'<h2 id="comparison">Comparison</h2>\n{html}<p>Made by <code>{command}</code>.</p>\n'
    write_atomically(page, [text.replace(_ANCHOR, section + _ANCHOR).encode()])


def verdict_of(result: Any) -> Checked:
    """A verification as one cell: how many claims hold, or the first that does not."""
    false = [claim.name for claim in result.claims if not claim.holds]
    if not result.ok:
        return Checked(False, f"false: {false[0] if false else 'a claim'}")
    return Checked(True, f"{len(result.claims)} claims hold")
