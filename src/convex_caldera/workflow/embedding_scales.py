"""From the weighted error of a compressed embedding to nats: a scale for every option, measured.

An option's distortion is its weighted error times a scale, as of every layer. Layers share one
scale among their options (`workflow.held_out`); an embedding, whose weighted error knows one of
its uses at best, has one for each: the measured KL over the weighted error.
"""

from __future__ import annotations

from collections.abc import Sequence

from convex_caldera.models.embeddings import EmbeddingSite
from convex_caldera.storage.partial import PartialRun
from convex_caldera.workflow.compression import Compression
from convex_caldera.workflow.distortion_unit import SCALE
from convex_caldera.workflow.embedding_curvatures import gradient_curvatures


def measure_scales(
    compression: Compression, kept: PartialRun, site: EmbeddingSite, keys: Sequence[str]
) -> None:
    """Add its scale to the record of every option that has none, where losses are nats.

    Args:
        kept: the options as they were fitted, by `keys`.

    Cost: one forward pass over `perturbation.MEASURED_TOKENS` an option.
    """
    curvatures = gradient_curvatures(compression.fitter.curvatures)
    missing = [key for key in keys if SCALE not in kept.record(key)]
    if curvatures is None or not missing:
        return
    compression.progress.start(f"KL of {site.name}", len(missing))
    layers = [kept.get(key) for key in missing]
    found = curvatures.measured_kl(f"{site.parameter}.weight", [y.decode() for y in layers])
    for key, layer, kl in zip(missing, layers, found, strict=True):
        record = kept.record(key)
        scale = kl / record["loss"] if record["loss"] > 0 else 1.0
        kept.put(key, layer, {**record, SCALE: scale})
        compression.progress.advance(key)
