"""A staged configuration small enough for the tiny Llama, and how tests change it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from convex_caldera.workflow.stage_config import make_config, overridden, read_document
from convex_caldera.workflow.stage_schema import StagedConfig
from convex_caldera.workflow.templates import find

SMALL = (
    "profile.max_length=16",
    "profile.num_samples=4",
    "evaluate.perplexity.max_length=32",
    "evaluate.perplexity.num_samples=4",
    "approximate.default.rank=4",
    "l_config.linear.rank=4",
)
_texts: list[str] = []


@pytest.fixture(scope="module", autouse=True)
def short_texts(text: Path, held_out: Path) -> None:
    """Calibrate and evaluate on texts that are read at once; import it to use it."""
    _texts[:] = [f"profile.dataset={text}", f"evaluate.perplexity.dataset={held_out}"]


def small() -> list[str]:
    return [*SMALL, *_texts]


def document(*overrides: str) -> dict[str, Any]:
    return overridden(read_document(find("lqer")), [*small(), *overrides])


def config(model: Path, *overrides: str) -> StagedConfig:
    return make_config({**document(*overrides), "model_name": str(model)})
