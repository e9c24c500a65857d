"""`train_nerv_all.py` of the mission: one decoder for chosen layers, by its flags.

python -m convex_caldera.compat.train_nerv_all --model_name_or_path MODEL --results_path OUT
    --vid q0_512 --enc_dim 64_16 --modelsize 7.2
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from convex_caldera.compat.reallm import NervArguments, run_as


def main(argv: Sequence[str] | None = None) -> int:
    """Compress by the flags given; the exit codes are those of the command line."""
    return run_as(NervArguments, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
