"""Local files of tasks: found by name, read whole, checked row by row.

`.jsonl`, `.jsonl.gz` and `.json` hold one object a row; `.txt` and `.raw` are texts (WikiText's
pages or one C4 document a line). An error names file, line, field and remedy.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convex_caldera.errors import DataError, RecipeError
from convex_caldera.evaluate.task_table import TASKS, Document, Task, task_named

_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".txt", ".raw")
# A page of raw WikiText begins with its title between single equals signs.
_TITLE = re.compile(r"^ ?= [^=].*[^=] = ?$")


@dataclass(frozen=True)
class TaskData:
    """The documents of one task, in the order of the file, and which file it was."""

    task: Task
    documents: tuple[Document, ...]
    file: str
    sha256: str

    def first(self, limit: int | None) -> tuple[Document, ...]:
        """At most `limit` documents, of each part for a task of several parts."""
        if limit is None or self.task.part is None:
            return self.documents[:limit]
        return tuple(d for part in self.parts(limit).values() for d in part)

    def parts(self, limit: int | None) -> dict[str, list[Document]]:
        """Documents by part, at most `limit` of each; one part "" where a task has none."""
        found: dict[str, list[Document]] = {}
        for document in self.documents:
            key = document[self.task.part] if self.task.part else ""
            found.setdefault(key, []).append(document)
        return {key: documents[:limit] for key, documents in found.items()}


def parse_sources(sources: Sequence[str]) -> tuple[list[Path], dict[str, Path]]:
    """Folders, and files by task, of `--task-data DIR` and `--task-data TASK=FILE`.

    Raises:
        RecipeError: a folder or file does not exist, or the task is unknown.
    """
    folders: list[Path] = []
    files: dict[str, Path] = {}
    for source in sources:
        name, mark, file = source.partition("=")
        if mark and name in TASKS:
            files[name] = Path(file).expanduser()
        elif (folder := Path(source).expanduser()).is_dir():
            folders.append(folder)
        elif mark:
            task_named(name)
        else:
            raise RecipeError(f"--task-data {source}: no such folder; give DIR or TASK=FILE")
    return folders, files


def find_file(task: Task, folders: Sequence[Path], files: Mapping[str, Path]) -> Path:
    """The file of a task: the one named for it, else the first stem in the first folder.

    Raises:
        DataError: there is none; the message lists what was looked for and the files there.
    """
    if task.name in files:
        return files[task.name]
    for folder in folders:
        for stem in task.stems:
            for suffix in _SUFFIXES:
                if (folder / f"{stem}{suffix}").is_file():
                    return folder / f"{stem}{suffix}"
    there = sorted(p.name for f in folders for p in f.iterdir() if p.name.endswith(_SUFFIXES))
    near = [name for name in there if name.startswith(task.name)]
    raise DataError(
        f"task {task.name}: no {' or '.join(task.stems)} ({', '.join(_SUFFIXES)}) in "
        f"{', '.join(map(str, folders)) or 'any folder'}; give --task-data DIR or "
        f"--task-data {task.name}=FILE"
        + (f" (there is {', '.join(near)}, which is another task)" if near else "")
    )


def read_task(task: Task, path: Path) -> TaskData:
    """All documents of a task's file.

    Raises:
        DataError: the file is missing, not readable, empty, or a row lacks a field or has a label
            out of range; names file and line.
    """
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.name.endswith(".gz") else raw).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"task {task.name}: {path} cannot be read: {error}") from error
    suffix = path.name.removesuffix(".gz").rpartition(".")[2]
    reader = _READERS.get(suffix)
    if reader is None:
        raise DataError(f"task {task.name}: {path} must end in {', '.join(_SUFFIXES)}")
    documents = tuple(
        _document(task, row, f"{path}, {where}") for where, row in reader(text, task, path)
    )
    if not documents:
        raise DataError(f"task {task.name}: {path} is an empty split; it has no items")
    return TaskData(task, documents, path.name, hashlib.sha256(raw).hexdigest())


def _document(task: Task, row: Any, where: str) -> Document:
    if not isinstance(row, dict):
        raise DataError(f"task {task.name}: {where}: a row must be an object, not {row!r:.60}")
    form = next((f for f in task.forms if all(k in row for k in f.fields)), None)
    if form is None:
        nearest = min(task.forms, key=lambda f: sum(k not in row for k in f.fields))
        missing = [k for k in nearest.fields if k not in row]
        accepted = " or ".join(", ".join(f.fields) for f in task.forms)
        raise DataError(
            f"task {task.name}: {where}: missing field {missing[0]!r}; a row has {accepted}"
        )
    try:
        return form.convert(row)
    except (ValueError, AttributeError, TypeError) as error:
        raise DataError(f"task {task.name}: {where}: {error}") from error


def _lines(text: str, task: Task, path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"line {number}", _parsed(line, f"task {task.name}: {path}, line {number}")


def _array(text: str, task: Task, path: Path) -> Iterator[tuple[str, Any]]:
    rows = _parsed(text, f"task {task.name}: {path}")
    if not isinstance(rows, list):
        raise DataError(f"task {task.name}: {path} must hold a list of objects")
    for number, row in enumerate(rows, 1):
        yield f"item {number}", row


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{where}: not JSON: {error}") from error


def _plain(text: str, task: Task, path: Path) -> Iterator[tuple[str, Any]]:
    if task.kind != "text":
        raise DataError(f"task {task.name}: {path} is plain text; give rows as .jsonl")
    if task.name == "wikitext2":
        for number, page in enumerate(wikitext_pages(text), 1):
            yield f"page {number}", {"page": page}
    else:
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield f"line {number}", {"text": line}


def wikitext_pages(text: str) -> list[str]:
    """Raw WikiText cut before every title, as the document-level data set of the harness is."""
    pages: list[list[str]] = [[]]
    for line in text.splitlines(keepends=True):
        if _TITLE.match(line.rstrip("\n")) and any(part.strip() for part in pages[-1]):
            pages.append([])
        pages[-1].append(line)
    return [page for page in map("".join, pages) if page.strip()]


_READERS: dict[str, Callable[[str, Task, Path], Iterator[tuple[str, Any]]]] = {
    "jsonl": _lines,
    "json": _array,
    "txt": _plain,
    "raw": _plain,
}
