"""`run_vqdora.py` of the mission: low rank and vector-quantized codes, by its flags.

python -m convex_caldera.compat.run_vqdora --model_name_or_path MODEL --results_path OUT
    --lora_model_name nf2 --lora_num_ranks 64
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from convex_caldera.compat.reallm import ReALLMArguments, run_as


def main(argv: Sequence[str] | None = None) -> int:
    """Compress by the flags given; the exit codes are those of the command line."""
    return run_as(ReALLMArguments, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
