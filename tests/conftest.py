"""What holds for all tests: the same examples in every run, no clock in the laws, tiny models."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests import tiny_models
from tests.examples import QUICK, THOROUGH

# Deterministic, so that a red run is red for everybody: few examples in every run, all of them
# in `make test-slow`; to search further, run pytest --hypothesis-profile=explore.
fixed = settings(deadline=None, derandomize=True, database=None)
settings.register_profile("house", fixed, max_examples=QUICK)
settings.register_profile("thorough", fixed, max_examples=THOROUGH)
settings.register_profile("explore", deadline=None)
settings.load_profile("house")


def pytest_collection_finish() -> None:
    """Spare the garbage collector the million objects of what was imported: they stay anyway."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_disks() -> Iterator[None]:
    """`os.fsync` does nothing: no test cuts the power, and what a killed process wrote is there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_model(family, **options)`: the directory of a saved tiny model, made once a session.

    Families and options are those of `tests.tiny_models.save`. Do not write into it.
    """
    made: dict[Any, Path] = {}

    def make(family: str = "llama", **options: Any) -> Path:
        key = (family, tuple(sorted(options.items())))
        if key not in made:
            directory = tmp_path_factory.mktemp(f"tiny-{family}")
            made[key] = tiny_models.save(directory, family, **options)
        return made[key]

    return make
