"""A directory as transformers loads it, every tensor in its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def from_transformers(directory: Path, **options: Any) -> Any:
    """The model, in evaluation mode; fails if a tensor is missing or one too many."""
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        directory, output_loading_info=True, **options
    )
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    return model
