"""What happened in training, as JSON lines and, where asked for, as TensorBoard events."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from convex_caldera.errors import RecipeError


class Journal:
    """Appends one JSON object per event to `path`; silent if there is none.

    Args:
        path: a .jsonl file, appended to when a run is resumed.
        tensorboard: a folder for event files; needs the package `tensorboard`.

    Raises:
        RecipeError: TensorBoard is asked for and not installed.
    """

    def __init__(self, path: Path | None = None, tensorboard: Path | None = None):
        self._path = path
        self._events = None if tensorboard is None else _writer(tensorboard)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, stage: str, event: str, **figures: Any) -> None:
        """One line; numbers named `step` place the others in TensorBoard."""
        if self._path is not None:
            line = {"time": round(time.time(), 3), "stage": stage, "event": event, **figures}
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        if self._events is not None and "step" in figures:
            for name, value in figures.items():
                if name != "step" and isinstance(value, int | float):
                    self._events.add_scalar(f"{stage}/{name}", value, figures["step"])

    def close(self) -> None:
        """Flush what TensorBoard holds back."""
        if self._events is not None:
            self._events.close()


def _writer(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise RecipeError(
            "TensorBoard is not installed (pip install tensorboard); the JSON lines are written "
            "without it"
        ) from error
    return SummaryWriter(str(folder))
