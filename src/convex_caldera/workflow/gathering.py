"""The curvatures that a job asks for, from a file, from text, or from text and images."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from convex_caldera.errors import RecipeError
from convex_caldera.models.embeddings import without_embeddings
from convex_caldera.models.sites import Site
from convex_caldera.models.skeleton import Skeleton
from convex_caldera.workflow.collecting import gather
from convex_caldera.workflow.curvatures import GRADIENT_KINDS, Curvatures
from convex_caldera.workflow.diagonals import diagonal_curvatures
from convex_caldera.workflow.embedding_curvatures import with_embeddings
from convex_caldera.workflow.images import ImageSet
from convex_caldera.workflow.job import Job
from convex_caldera.workflow.progress import Progress
from convex_caldera.workflow.settings import Settings


def curvatures_of(job: Job, folder: Path, progress: Progress) -> Curvatures:
    """Gathered, and kept in `folder`. Raises what `gather` and `diagonal_curvatures` raise."""
    layers = _of_layers(job, folder, progress)
    return with_embeddings(layers, job.skeleton, job.sites, job.tokens, folder, progress)


def _of_layers(job: Job, folder: Path, progress: Progress) -> Curvatures:
    if job.diag_hessians is not None:
        sites = without_embeddings(job.sites)
        return diagonal_curvatures(job.diag_hessians, job.skeleton, sites, folder)
    return gather(
        job.curvature,
        job.skeleton,
        job.sites,
        job.tokens,
        folder,
        job.settings.seed,
        progress,
        job.gradient_options,
        job.images,
    )


def images_for(
    settings: Settings, kind: str, skeleton: Skeleton, sites: Collection[Site]
) -> ImageSet | None:
    """The images that a curvature of these layers needs, or None if it needs none.

    Raises:
        RecipeError: images that are needed are not given, or would not be looked at; curvature
            or targets that only the language model has.
        DataError: the folder holds no images.
    """
    count = len(skeleton.structure.blocks)
    beyond = [site.name for site in sites if site.block >= count]
    if beyond and settings.targets == "drift-corrected":
        raise RecipeError(
            f"{settings.targets} targets are of the language model, which does not hold "
            f"{beyond[0]}; choose --targets original or --modules language"
        )
    if beyond and kind in GRADIENT_KINDS:
        raise RecipeError(
            f"{kind} curvature is of the loss on text, which does not reach {beyond[0]}; choose "
            "--curvature input with --images DIR, or --diag-hessians FILE"
        )
    needed = bool(beyond) and kind == "input"
    if needed and settings.images is None:
        raise RecipeError(
            f"{beyond[0]} reads images, not text: give --images DIR or --diag-hessians FILE, or "
            "choose --curvature none"
        )
    if settings.images is not None and not needed:
        raise RecipeError(
            "no layer is calibrated on images; leave out --images, or choose --modules with "
            "tower or projector and --curvature input"
        )
    if settings.images is None:
        return None
    images = ImageSet(Path(settings.images), settings.nsamples, skeleton.path)
    len(images)  # a folder that is missing or empty is known before any work
    return images
