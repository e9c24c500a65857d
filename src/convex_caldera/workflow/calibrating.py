"""Collect and save the input statistics of a model, to be reused and to verify with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from convex_caldera.calibrate.collect import collect
from convex_caldera.calibrate.saved import INDEX, Provenance, save_statistics
from convex_caldera.calibrate.text import fingerprint
from convex_caldera.errors import ResumeError
from convex_caldera.models.resolve import resolve_model
from convex_caldera.models.skeleton import Skeleton
from convex_caldera.workflow.compress import calibration_tokens, computing_dtype
from convex_caldera.workflow.models import usable_device
from convex_caldera.workflow.progress import Progress, Silent
from convex_caldera.workflow.settings import Settings


def calibrate_to(
    settings: Settings, out: Path, *, progress: Progress | None = None
) -> dict[str, Any]:
    """Second moments of every input site of a model, one file per block.

    Raises:
        ModelError, DataError, NumericalError, InterruptedRunError: as their names say.
        ResumeError: `out` holds something else, or statistics of another model or text.
    """
    progress = progress or Silent()
    if out.exists() and not (out / INDEX).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise ResumeError(f"{out} is not empty and holds no statistics; choose another directory")
    path = resolve_model(settings.model)
    skeleton = Skeleton(path, computing_dtype(settings), usable_device(settings.device))
    tokens = calibration_tokens(settings, skeleton)
    provenance = Provenance(
        skeleton.checkpoint.fingerprint, fingerprint(tokens), str(skeleton.dtype).split(".")[-1]
    )
    progress.start("blocks", len(skeleton.structure.blocks))
    sites = 0
    for block in collect(skeleton, tokens):
        save_statistics(out, block.index, block.inputs, provenance)
        sites += len(block.inputs)
        progress.advance(block.name)
    return {"output": str(out), "sites": sites, "tokens": tokens.numel()}
