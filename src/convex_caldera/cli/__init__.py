"""The command `convex-caldera`: argument parsing only; every command is one workflow call."""

from __future__ import annotations

import sys


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns (and exits with) the documented code."""
    from convex_caldera.cli.app import run

    code = run(sys.argv[1:] if argv is None else argv)
    if argv is None:
        raise SystemExit(code)
    return code
