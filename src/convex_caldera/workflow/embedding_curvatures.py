"""What rounding sees of embeddings, beside the curvatures of linear layers.

The head multiplies the final hidden state h, so an embedding that is used as one is rounded under
H = E[h h^T]. A lookup reads rows one by one, which weighs no input channel: H = I. A matrix with
both uses is rounded under the first, which is what feedback can make use of; what it costs in
nats, both uses together, is measured (`workflow.embedding_kl`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from convex_caldera.calibrate.head_inputs import head_inputs
from convex_caldera.calibrate.saved import INDEX, Provenance, load_statistics, save_statistics
from convex_caldera.calibrate.text import fingerprint
from convex_caldera.core.hessian import Hessian
from convex_caldera.core.problem import Problem
from convex_caldera.models.embeddings import EmbeddingSite
from convex_caldera.models.sites import Site
from convex_caldera.models.skeleton import Skeleton
from convex_caldera.workflow.curvatures import Curvatures, GradientCurvatures
from convex_caldera.workflow.progress import Progress

# Where the statistics of embeddings lie, beside those of layers.
FOLDER = "embeddings"


class WithEmbeddings:
    """Curvatures of linear layers, and of embeddings beside them.

    Args:
        layers: of all other sites.
        moments: embedding -> H of what it is multiplied with; those without one have H = I.
        num_tokens: that the moments have seen.
    """

    def __init__(self, layers: Curvatures, moments: Mapping[str, Hessian], num_tokens: int):
        self.layers, self._moments, self._tokens = layers, dict(moments), num_tokens

    def problem(self, site: Site, W: Tensor) -> Problem:
        if not isinstance(site, EmbeddingSite):
            return self.layers.problem(site, W)
        H = self._moments.get(site.name) or Hessian.identity(site.shape[1], W.device)
        return Problem(W, H, site.name)

    def seen(self, site: Site, W: Tensor) -> Problem:
        if isinstance(site, EmbeddingSite):
            return self.problem(site, W)
        return self.layers.seen(site, W)

    @property
    def smooths(self) -> bool:
        return self.layers.smooths

    def tokens(self, site: Site) -> int:
        if not isinstance(site, EmbeddingSite):
            return self.layers.tokens(site)
        return self._tokens if site.name in self._moments else 0

    def notes(self) -> dict[str, Any]:
        return self.layers.notes()

    def replaced(self, layers: Curvatures) -> WithEmbeddings:
        """The same embeddings beside other layers."""
        return WithEmbeddings(layers, self._moments, self._tokens)


def with_embeddings(
    layers: Curvatures,
    skeleton: Skeleton,
    sites: Sequence[Site],
    tokens: Tensor | None,
    folder: Path,
    progress: Progress,
) -> Curvatures:
    """The curvatures of all sites; `layers` itself where no embedding is among them.

    Args:
        layers: of the other sites.
        tokens: calibration windows; without them every embedding has H = I.
        folder: of the statistics; those of embeddings are kept in a folder inside.

    Raises:
        ResumeError, NumericalError, DataError: as `gather`.
    """
    embeddings = [site for site in sites if isinstance(site, EmbeddingSite)]
    if not embeddings:
        return layers
    heads = [site.name for site in embeddings if "head" in site.uses]
    if tokens is None or not heads:
        return WithEmbeddings(layers, {}, 0)
    dtype = str(skeleton.dtype).split(".")[-1]
    provenance = Provenance(skeleton.checkpoint.fingerprint, fingerprint(tokens), dtype)
    place = folder / FOLDER
    known = load_statistics(place, provenance) if (place / INDEX).is_file() else {}
    if 0 not in known or set(heads) - set(known[0]):
        progress.start("output head", 1)
        save_statistics(place, 0, {n: head_inputs(skeleton, tokens, n) for n in heads}, provenance)
        progress.advance(heads[0])
    saved = load_statistics(place, provenance)[0]
    moments = {name: saved[name].hessian() for name in heads}
    return WithEmbeddings(layers, moments, saved[heads[0]].num_tokens)


def with_layers(curvatures: Curvatures, layers: Curvatures) -> Curvatures:
    """The same, but other curvatures of linear layers."""
    return curvatures.replaced(layers) if isinstance(curvatures, WithEmbeddings) else layers


def gradient_curvatures(curvatures: Curvatures) -> GradientCurvatures | None:
    """Those of the model's own loss, where linear layers have them."""
    layers = curvatures.layers if isinstance(curvatures, WithEmbeddings) else curvatures
    return layers if isinstance(layers, GradientCurvatures) else None
