"""Progress with ETA: a bar on a terminal, plain lines elsewhere, silence in a library call."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol


class Progress(Protocol):
    """What a workflow tells: a stage with a number of units, and units as they finish."""

    def start(self, stage: str, total: int) -> None: ...

    def advance(self, note: str = "") -> None: ...


class Silent:
    """Says nothing."""

    def start(self, stage: str, total: int) -> None:
        del stage, total

    def advance(self, note: str = "") -> None:
        del note


class Lines:
    """One line per stage and about one per `every` seconds, with the time still to go."""

    def __init__(self, write: Callable[[str], object] | None = None, every: float = 5.0):
        self._write = write or (lambda line: print(line, file=sys.stderr, flush=True))  # noqa: T201
        self._every = every
        self._stage, self._total, self._done = "", 0, 0
        self._began = self._last = 0.0

    def start(self, stage: str, total: int) -> None:
        self._stage, self._total, self._done = stage, total, 0
        self._began = self._last = time.monotonic()

    def advance(self, note: str = "") -> None:
        self._done += 1
        now = time.monotonic()
        finished = self._done == self._total
        if finished or now - self._last >= self._every:
            self._last = now
            self._write(self._line(now - self._began, note))

    def _line(self, elapsed: float, note: str) -> str:
        left = elapsed / self._done * (self._total - self._done)
        timing = f"{elapsed:.0f}s" if self._done == self._total else f"{left:.0f}s left"
        return f"{self._stage}: {self._done}/{self._total}, {timing}" + (
            f"  {note}" if note else ""
        )


class Bar:
    """A rich progress bar with ETA, for terminals."""

    def __init__(self) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as RichProgress

        self._rich = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self._task = None

    def __enter__(self) -> Bar:
        self._rich.start()
        return self

    def __exit__(self, *details: object) -> None:
        self._rich.stop()

    def start(self, stage: str, total: int) -> None:
        self._task = self._rich.add_task(stage, total=total, note="")

    def advance(self, note: str = "") -> None:
        if self._task is not None:
            self._rich.update(self._task, advance=1, note=note)


@contextmanager
def shown() -> Iterator[Progress]:
    """A bar if standard error is a terminal, else lines."""
    if sys.stderr.isatty():
        with Bar() as bar:
            yield bar
    else:
        yield Lines()
