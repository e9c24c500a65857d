"""The application: its commands, and how errors become exit codes.

Exit codes: 0 done, 2 usage or input, 3 infeasible budget, 4 a check failed, 5 interrupted and
resumable. Commands live in the files beside this one; heavy imports stay inside them, so that
--help answers at once.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import typer

from convex_caldera.cli import compressing, measuring, reading, staging, tuning
from convex_caldera.errors import ConvexCalderaError

app = typer.Typer(
    name="convex-caldera",
    help="Compress a language model to any number of bits or bytes, and prove what was promised.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
compressing.add_commands(app)
reading.add_commands(app)
staging.add_commands(app)
measuring.add_commands(app)
tuning.add_commands(app)

USAGE, INTERRUPTED = 2, 5
# typer's codes for an abort by the user and for Ctrl-C; it has no other use for them.
_ABORTED = (1, 130)


@functools.cache
def command_line() -> Any:
    """The click group of all commands: reading every signature takes 40 ms, once a process."""
    return typer.main.get_command(app)


def run(argv: list[str]) -> int:
    """Parse, run one command, and turn every expected error into one line and a code."""
    try:
        command_line()(argv, prog_name="convex-caldera")
    except SystemExit as stop:
        return INTERRUPTED if stop.code in _ABORTED else int(stop.code or 0)
    except ConvexCalderaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:  # a path of the user that cannot be read or written
        print(f"error: {error}", file=sys.stderr)
        return USAGE
    return 0
