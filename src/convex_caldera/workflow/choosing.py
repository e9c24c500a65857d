"""The parts of a model that a run may compress."""

from __future__ import annotations

from convex_caldera.models.image_parts import parse_modules
from convex_caldera.models.sites import Site
from convex_caldera.models.skeleton import Skeleton
from convex_caldera.workflow.settings import Settings


def sites_for(skeleton: Skeleton, settings: Settings) -> tuple[Site, ...]:
    """Linear layers of the parts wanted, then embeddings if they are wanted.

    Raises:
        ModelError: the model has no such part, or embeddings that are no tensors of its checkpoint.
    """
    layers = skeleton.sites_of(parse_modules(settings.modules))
    return (*layers, *(skeleton.embeddings if settings.embeddings else ()))
