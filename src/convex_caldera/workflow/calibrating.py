"""Collect and save the input statistics of a model, to be reused and to verify with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from convex_caldera.calibrate.collect import collect
from convex_caldera.calibrate.saved import Provenance, save_statistics
from convex_caldera.calibrate.text import fingerprint, token_windows
from convex_caldera.models.resolve import resolve_model
from convex_caldera.models.skeleton import Skeleton
from convex_caldera.models.tokenizer import load_tokenizer
from convex_caldera.workflow.compress import computing_dtype
from convex_caldera.workflow.progress import Progress, Silent
from convex_caldera.workflow.settings import Settings


def calibrate_to(
    settings: Settings, out: Path, *, progress: Progress | None = None
) -> dict[str, Any]:
    """Second moments of every input site of a model, one file per block.

    Raises:
        ModelError, DataError, NumericalError, InterruptedRunError: as their names say.
    """
    progress = progress or Silent()
    path = resolve_model(settings.model)
    skeleton = Skeleton(path, computing_dtype(settings), settings.device)
    tokens = token_windows(
        settings.dataset,
        load_tokenizer(path),
        settings.nsamples,
        settings.seqlen,
        settings.seed,
        allow_short=settings.allow_short,
    )
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
