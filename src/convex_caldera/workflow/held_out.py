"""By how much layers cost more on held-out sequences than the curvature says.

The curvature is fitted to the sequences that it was measured on and is a Kronecker product, which
the Fisher matrix is not: both flatter it.
"""

from __future__ import annotations

import math

from convex_caldera.models.embeddings import EmbeddingSite
from convex_caldera.workflow.embedding_curvatures import gradient_curvatures
from convex_caldera.workflow.fitting import loss_as_fitted
from convex_caldera.workflow.operating_points import Menus, OperatingPoints


def held_out_scale(points: OperatingPoints, probes: Menus) -> dict[str, float]:
    """A factor for all options of a layer; none at all without sequences held out.

    Per layer the ratio of the held-out sequence Fisher to the Kronecker loss of the same errors,
    those of its probes, drawn halfway to the mean of all layers since it is noisy. Embeddings have
    scales that are measured in another way.
    """
    compression = points.compression
    curvatures = gradient_curvatures(compression.fitter.curvatures)
    if curvatures is None or not curvatures.has_held_out:
        return {}
    sites, errors = points.sites, {}
    probes = {n: found for n, found in probes.items() if not isinstance(sites[n], EmbeddingSite)}
    for name, candidates in probes.items():
        W = compression.fitter.weight(sites[name])
        errors[name] = [points.layer(name, c.label).decode() - W for c in candidates]
    seed = compression.job.settings.seed
    seen = curvatures.held_out_loss(errors, seed, compression.progress)
    logs = {}
    for name, candidates in probes.items():
        said = [loss_as_fitted(points.record(name, c.label)) for c in candidates]
        ratios = [a / b for a, b in zip(seen[name], said, strict=True) if a > 0 and b > 0]
        if ratios:
            logs[name] = sum(map(math.log, ratios)) / len(ratios)
    mean = sum(logs.values()) / max(len(logs), 1)
    return {name: math.exp(0.5 * (logs.get(name, mean) + mean)) for name in probes}
