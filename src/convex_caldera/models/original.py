"""A whole original model through transformers, offline and without remote code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from convex_caldera.errors import ModelError
from convex_caldera.models.architectures import auto_class
from convex_caldera.models.meta import load_config
from convex_caldera.models.parameters import answer_to_old_names


@contextmanager
def _no_loading_bar() -> Iterator[None]:
    """Quiet while transformers loads; its setting is given back."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def load_original(path: Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """The causal language model of a directory, in evaluation mode, computing in `dtype`.

    Raises:
        ModelError: transformers cannot make a model of it.
    """
    try:
        with _no_loading_bar():
            model = auto_class(load_config(path)).from_pretrained(
                path, dtype=dtype, local_files_only=True, trust_remote_code=False
            )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{path}: transformers cannot load it ({error})") from error
    answer_to_old_names(model)
    return model.to(device).eval()
