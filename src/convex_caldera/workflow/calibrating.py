"""Collect and save the curvature of a model's layers, to be reused and to verify with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from convex_caldera.calibrate.saved import INDEX
from convex_caldera.calibrate.saved_curvature import CURVATURE_INDEX
from convex_caldera.errors import RecipeError, ResumeError
from convex_caldera.models.resolve import resolve_model
from convex_caldera.models.skeleton import Skeleton
from convex_caldera.workflow.choosing import sites_for
from convex_caldera.workflow.collecting import gather
from convex_caldera.workflow.compress import calibration_tokens, computing_dtype
from convex_caldera.workflow.curvatures import GradientOptions
from convex_caldera.workflow.embedding_curvatures import with_embeddings
from convex_caldera.workflow.gathering import images_for
from convex_caldera.workflow.models import usable_device
from convex_caldera.workflow.planning import chosen_sites
from convex_caldera.workflow.progress import Progress, Silent
from convex_caldera.workflow.settings import Settings


def calibrate_to(
    settings: Settings, out: Path, *, progress: Progress | None = None
) -> dict[str, Any]:
    """Second moments of every input site, or the curvature of every layer, in the folder `out`.

    `settings.curvature` says which; "auto" is "input". Both may lie in one folder. What is
    there already is kept and not collected again.

    Raises:
        ModelError, DataError, NumericalError, InterruptedRunError: as their names say.
        RecipeError: the curvature "none", of which there is nothing to save.
        ResumeError: `out` holds something else, or the statistics of another model or text.
    """
    kind = "input" if settings.curvature == "auto" else settings.curvature
    if kind == "none":
        raise RecipeError("curvature 'none' needs no calibration; choose input or kronecker")
    progress = progress or Silent()
    known = any((out / index).is_file() for index in (INDEX, CURVATURE_INDEX))
    if out.exists() and not known and (not out.is_dir() or any(out.iterdir())):
        raise ResumeError(f"{out} is not empty and holds no statistics; choose another directory")
    path = resolve_model(settings.model)
    skeleton = Skeleton(path, computing_dtype(settings), usable_device(settings.device))
    tokens = calibration_tokens(settings, skeleton)
    sites = chosen_sites(sites_for(skeleton, settings), settings.ignore)
    images = images_for(settings, kind, skeleton, sites)
    options = GradientOptions(draws=settings.draws)
    curvatures = gather(
        kind, skeleton, sites, tokens, out, settings.seed, progress, options, images
    )
    with_embeddings(curvatures, skeleton, sites, tokens, out, progress)
    return {
        "output": str(out),
        "curvature": kind,
        "sites": len({site.input_site for site in sites}),
        "layers": len(sites),
        "tokens": curvatures.tokens(sites[0]),
    }
