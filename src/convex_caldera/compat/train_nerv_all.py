"""`train_nerv_all.py` of the mission: one decoder for chosen layers, by its flags.

python -m convex_caldera.compat.train_nerv_all --model_name_or_path MODEL --results_path OUT
    --vid q0_512 --enc_dim 64_16 --modelsize 7.2
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from convex_caldera.compat.reallm import NervArguments, compress_as, parse_flags
from convex_caldera.errors import ConvexCalderaError


def main(argv: Sequence[str] | None = None) -> int:
    """Compress by the flags given; the exit codes are those of the command line."""
    try:
        arguments = parse_flags(NervArguments, sys.argv[1:] if argv is None else argv)
        summary = compress_as(arguments.settings(), arguments.results_path)
    except ConvexCalderaError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    sys.stdout.write(summary.text() + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
