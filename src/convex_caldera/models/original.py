"""A whole original model through transformers, offline and without remote code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from convex_caldera.errors import ModelError


def load_original(path: Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """The causal language model of a directory, in evaluation mode, computing in `dtype`.

    Raises:
        ModelError: transformers cannot make a model of it.
    """
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{path}: transformers cannot load it ({error})") from error
    return model.to(device).eval()
