"""Runs in other processes that die, or are told to stop, at a chosen moment.

A fork server has everything imported already, so that a fresh process costs nearly nothing.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.workflow.killing", "tests.workflow.preloaded"])


def start(arguments: list[object], die_at: int | None = None, slow: float = 0.0) -> BaseProcess:
    """`convex-caldera ARGUMENTS` in a process of its own; its exit code is the command's.

    Args:
        die_at: kill -9 itself right before the file written as number `die_at` is durable.
        slow: seconds to wait before each layer is fitted.
    """
    process = _CONTEXT.Process(target=_command, args=([*map(str, arguments)], die_at, slow))
    process.start()
    return process


def _command(arguments: list[str], die_at: int | None, slow: float) -> None:
    import torch

    from convex_caldera.cli import main
    from convex_caldera.workflow.fitting import Fitter

    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    fit = Fitter.fit

    def slowly(self: Fitter, *details: object) -> object:
        time.sleep(slow)
        return fit(self, *details)  # type: ignore[arg-type]

    Fitter.fit = slowly  # type: ignore[method-assign,assignment]
    code = 0
    with at_file(die_at, lambda: os.kill(os.getpid(), signal.SIGKILL)):
        code = main(arguments)
    os._exit(code)


@contextmanager
def at_file(number: int | None, action: Callable[[], None]) -> Iterator[list[int]]:
    """Do `action` right before the file written as number `number` is durable.

    Gives a list of one number, the files so far. Directories, whose entries are made durable
    the same way, do not count.
    """
    count, sync = [0], os.fsync

    def counting(descriptor: int) -> None:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            count[0] += 1
            if count[0] == number:
                action()
        sync(descriptor)

    os.fsync = counting
    try:
        yield count
    finally:
        os.fsync = sync


def wait_for(condition: Callable[[], bool], process: BaseProcess, seconds: float = 60) -> None:
    """Until `condition` holds; an assertion fails if the process ends or time runs out first."""
    limit = time.monotonic() + seconds
    while not condition():
        assert process.is_alive() and time.monotonic() < limit, process.exitcode
        time.sleep(0.005)


def finished_layers(out: Path) -> int:
    """Lines in the journal of a partial run."""
    journal = out / ".partial" / "layers.jsonl"
    return journal.read_bytes().count(b"\n") if journal.exists() else 0
