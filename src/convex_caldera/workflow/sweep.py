"""A grid of staged runs from one TOML file, resumable cell by cell, ending in one table.

    template = "lqer"            a shipped configuration, or a file beside this one
    [fixed]                      "section.key" = value, the same in every cell
    [[axis]]                     name, values, and the keys that each value is put under
    ...

Every combination of values is a cell in a folder of its own; cells that see the same text share
their statistics. A cell that fails on its own input does not stop the others: its error stands
in the table, and the sweep says so at the end.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from convex_caldera.errors import ConvexCalderaError, InterruptedRunError, RecipeError
from convex_caldera.evaluate.table import plain_table
from convex_caldera.recipes.records import canonical_json
from convex_caldera.storage.files import write_atomically
from convex_caldera.workflow.progress import Progress
from convex_caldera.workflow.stage_config import (
    Document,
    literal,
    make_config,
    overridden,
    put,
    read_document,
)
from convex_caldera.workflow.stage_schema import StagedConfig, Strict
from convex_caldera.workflow.stages import Stages
from convex_caldera.workflow.templates import find

HEADINGS = ("precision", "bits/weight", "file bytes", "perplexity", "KL", "relative loss")
MISSING = "-"
_NOT_IN_TABLE = ("seconds", "output", "tasks", "options")


class Axis(Strict):
    """One dimension of the grid; each value is put under every key."""

    name: Annotated[str, Field(pattern="[a-z0-9_-]+")]
    values: Annotated[list[Any], Field(min_length=1)]
    keys: Annotated[list[str], Field(min_length=1)]


class SweepFile(Strict):
    """A whole sweep file."""

    name: str
    template: str
    fixed: dict[str, Any] = Field(default_factory=dict)
    axis: Annotated[list[Axis], Field(min_length=1)]


@dataclass(frozen=True)
class Cell:
    """One combination of values, and the configuration that it makes."""

    values: dict[str, Any]
    config: StagedConfig

    @property
    def name(self) -> str:
        """Of its folder: rank=32,w_width=4."""
        parts = (f"{key}={_short(value)}" for key, value in self.values.items())
        return ",".join(parts)


@dataclass(frozen=True)
class Sweep:
    """A grid made from a file and what the command line changed."""

    name: str
    varied: tuple[str, ...]
    cells: tuple[Cell, ...]


def read_sweep(
    source: str,
    *,
    template: str | None = None,
    axes: Sequence[str] = (),
    overrides: Sequence[str] = (),
) -> Sweep:
    """The cells of a sweep, all checked before the first is run.

    Args:
        source: a file, or the name of a shipped one (`sweep_lqer_act`).
        template: another configuration than the file names.
        axes: "rank=[16, 32]" replaces the values of an axis.
        overrides: "section.key=value", after everything else in every cell.

    Raises:
        RecipeError: unknown keys, an axis twice, or a cell that contradicts itself.
    """
    path = find(source)
    try:
        file = SweepFile(**read_document(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise RecipeError(f"{path.name}: {where}: {first['msg']}") from error
    grid = {axis.name: axis for axis in file.axis}
    if len(grid) < len(file.axis):
        raise RecipeError(f"{path.name}: two axes of one name")
    for text in axes:
        axis = _replaced(text, grid)
        grid[axis.name] = axis
    base = read_document(find(template or file.template, beside=path.parent))
    for key, value in file.fixed.items():
        put(base, key.split("."), value)
    cells = []
    for combination in itertools.product(*(axis.values for axis in grid.values())):
        document = overridden(base, ())
        for axis, value in zip(grid.values(), combination, strict=True):
            for key in axis.keys:
                put(document, key.split("."), value)
        values = dict(zip(grid, combination, strict=True))
        cells.append(_cell(values, overridden(document, overrides)))
    varied = tuple(axis.name for axis in grid.values() if len(axis.values) > 1)
    return Sweep(file.name, varied or tuple(grid)[:1], tuple(cells))


def run_sweep(
    sweep: Sweep, out: Path, *, progress: Progress | None = None, workers: int | None = None
) -> dict[str, Any]:
    """Run every cell that is not done; the table as plain data, also in OUT/sweep.json and .md.

    Raises:
        InterruptedRunError: the disk is full or the user stopped; finished work stays.
    """
    rows = []
    for cell in sweep.cells:
        stages = Stages(
            cell.config,
            out / "cells" / cell.name,
            profile=out / "profiles" / _profile_name(cell.config),
            progress=progress,
            workers=workers,
        )
        try:
            rows.append(_row(cell, stages.run()))
        except InterruptedRunError:
            raise
        except ConvexCalderaError as error:
            rows.append({"values": cell.values, "error": str(error)})
        record = {"name": sweep.name, "varied": list(sweep.varied), "cells": rows}
        _write(out, "sweep.json", json.dumps(record, indent=1, sort_keys=True) + "\n")
    _write(out, "sweep.md", markdown(record))
    return record


def table_text(record: Mapping[str, Any]) -> str:
    """The table, aligned; errors below it."""
    headings, rows = _cells(record)
    failed = [
        f"{_label(row['values'])}: {row['error']}" for row in record["cells"] if "error" in row
    ]
    return "\n".join([plain_table(headings, rows), *failed])


def markdown(record: Mapping[str, Any]) -> str:
    """The same table for a page."""
    headings, rows = _cells(record)
    lines = [f"# {record['name']}", "", f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    failed = [row for row in record["cells"] if "error" in row]
    lines += ["", *(f"* {_label(row['values'])}: {row['error']}" for row in failed)]
    return "\n".join(lines).rstrip() + "\n"


def _cells(record: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    axes = list(record["cells"][0]["values"])
    tasks = sorted({task for row in record["cells"] for task in row.get("tasks", {})})
    rows = []
    for row in record["cells"]:
        values = [_short(row["values"][axis]) for axis in axes]
        shown = [
            row.get("precision") or MISSING,
            _number(row.get("bits_per_compressed_weight"), 3),
            MISSING if row.get("file_bytes") is None else f"{row['file_bytes']:,}",
            _number(row.get("perplexity"), 3),
            _number(row.get("kl"), 4),
            _number(row.get("mean_relative_loss"), 5),
        ]
        rows.append(values + shown + [_number(row.get("tasks", {}).get(t), 4) for t in tasks])
    blank = [MISSING] * len(tasks)
    originals = {r["original_perplexity"] for r in record["cells"] if "original_perplexity" in r}
    first = [
        ["original", *[""] * (len(axes) - 1), *["W16A16", MISSING, MISSING], _number(p, 3)]
        + [_number(0.0, 4), _number(0.0, 5), *blank]
        for p in sorted(originals)
    ]
    return [*axes, *HEADINGS, *tasks], first + rows


def _row(cell: Cell, results: Mapping[str, Any]) -> dict[str, Any]:
    """What the table shows of a cell, from the results of its stages."""
    row: dict[str, Any] = {"values": cell.values, "seconds": {}}
    for stage, result in results.items():
        row["seconds"][stage] = result["seconds"]
        row |= {k: v for k, v in result.items() if k not in _NOT_IN_TABLE}
    tasks = results.get("downstream", {}).get("tasks", {})
    row["tasks"] = {name: _main_metric(metrics) for name, metrics in tasks.items()}
    return row


def _main_metric(metrics: Mapping[str, Any]) -> float | None:
    """The value of a task's first metric."""
    for entry in metrics.values():
        if isinstance(entry, Mapping) and isinstance(entry.get("value"), int | float):
            return float(entry["value"])
        if isinstance(entry, Mapping):
            return _main_metric(entry)
    return None


def _replaced(text: str, grid: Mapping[str, Axis]) -> Axis:
    name, equals, values = text.partition("=")
    chosen = literal(values)
    if not equals or name not in grid or not isinstance(chosen, list) or not chosen:
        raise RecipeError(
            f"axis {text!r} must read name=[value, ...] with one of {', '.join(grid)}"
        )
    return grid[name].model_copy(update={"values": chosen})


def _cell(values: dict[str, Any], document: Document) -> Cell:
    try:
        return Cell(values, make_config(document))
    except RecipeError as error:
        raise RecipeError(f"cell {_label(values)}: {error}") from error


def _profile_name(config: StagedConfig) -> str:
    """Cells that read the same text with the same model share this folder."""
    text = canonical_json(
        {"model": config.model_name, "profile": config.profile.model_dump(mode="json")}
    )
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _label(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {_short(value)}" for key, value in values.items())


def _short(value: Any) -> str:
    """A value as part of a file name: [1, 16] is 1x16."""
    text = "x".join(map(str, value)) if isinstance(value, list) else str(value)
    return re.sub(r"[^A-Za-z0-9._+-]", "_", text)


def _number(value: float | None, digits: int) -> str:
    return MISSING if value is None else f"{value:.{digits}f}"


def _write(out: Path, name: str, text: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / name, [text.encode()])


def points(record: Mapping[str, Any]) -> Iterable[tuple[str, float, float, float | None]]:
    """(line, bits, perplexity, standard error) of every finished cell, for the plot.

    A line is all cells that agree in the last varied axis, or in the first if there is one.
    """
    for row in record["cells"]:
        if row.get("perplexity") is None:
            continue
        series = record["varied"][:1] if len(record["varied"]) > 1 else []
        line = ", ".join(f"{axis} {_short(row['values'][axis])}" for axis in series)
        yield (
            line or record["name"],
            row["bits_per_compressed_weight"],
            row["perplexity"],
            row["perplexity_stderr"],
        )
