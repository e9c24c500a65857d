"""Fixtures of tests/workflow and tests/cli: one text, and each compression made once a session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.workflow.running import Ran, compress, json_path, write_text

# Headers and scales take more than a bit per weight on models this small.
BITS = 6


@dataclass(frozen=True)
class Output:
    """A finished compression: its directory, what was compressed, and what the command said."""

    directory: Path
    model: Path
    method: str
    ran: Ran


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """torch on one thread: tiny products are slower on more, and test processes share cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration text."""
    return write_text(tmp_path_factory.getbasetemp() / "calibration.txt")


@pytest.fixture(scope="session")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another text, to evaluate on."""
    return write_text(tmp_path_factory.getbasetemp() / "held-out.txt", lines=30, seed=1)


# Both directories of tests see one cache, whichever of them asks first.
_made: dict[tuple[Path, str, str, str], Output] = {}


@pytest.fixture(scope="session")
def compressed(
    tiny_model: Callable[..., Path], text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Output]:
    """`compressed(method, family="llama", **options of the model)`; do not write into it."""
    base = tmp_path_factory.getbasetemp()

    def make(method: str, family: str = "llama", **options: Any) -> Output:
        key = (base, method, family, repr(sorted(options.items())))
        if key not in _made:
            out = tmp_path_factory.mktemp(f"{method}-{family}") / "out"
            model = tiny_model(family, **options)
            ran = compress(model, out, text, "--method", method, "--bits", BITS)
            assert ran.code == 0, ran.err
            assert json_path(out).is_file()
            _made[key] = Output(out, model, method, ran)
        return _made[key]

    return make
