"""A training run on disk: tensors in safetensors, everything else in its metadata; no pickle.

Written whole under a temporary name and renamed, so that a kill leaves the state before or the
state after, and going on from either leads to the same numbers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import Tensor

from convex_caldera.errors import ResumeError
from convex_caldera.storage.files import write_atomically

KEY = "finetune"


@dataclass
class Position:
    """Where a run is: steps done, and what its evaluations have found."""

    step: int = 0
    strikes: int = 0
    best_step: int = 0
    first: float = float("nan")
    best: float = float("nan")
    seconds: float = 0.0
    stopped: str = ""
    evaluations: list[tuple[int, float]] = field(default_factory=list)


def save_state(path: Path, tensors: Mapping[str, Tensor], position: Position) -> None:
    """Write tensors and position durably."""
    from safetensors.torch import save

    path.parent.mkdir(parents=True, exist_ok=True)
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, [save(plain, {KEY: json.dumps(asdict(position))})])


def load_state(path: Path) -> tuple[dict[str, Tensor], Position] | None:
    """What `save_state` wrote, or None if there is nothing.

    Raises:
        ResumeError: the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            record = json.loads((file.metadata() or {})[KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        record["evaluations"] = [tuple(item) for item in record["evaluations"]]
        return tensors, Position(**record)
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise ResumeError(f"{path}: damaged training state ({error}); remove it") from error
