"""Statistics of what the vision tower and the projector read, over images.

Text never reaches these parts. Every image goes once through tower and projector, whose weights
are in memory together (they are small beside a language model); the inputs of all layers that are
asked for are added up at once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from convex_caldera.calibrate.collect import Meter
from convex_caldera.calibrate.statistics import InputAccumulator, InputStatistics
from convex_caldera.errors import DataError
from convex_caldera.models.skeleton import Skeleton


def collect_images(
    skeleton: Skeleton,
    images: Iterable[Mapping[str, Tensor]],
    blocks: Collection[int],
    progress: Callable[[], None] | None = None,
) -> dict[int, dict[str, InputStatistics]]:
    """Statistics by block and input site.

    Args:
        skeleton: of a model that reads images.
        images: each as its image processor gives it: `pixel_values`, and `image_sizes` if any.
        blocks: of tower and projector, as their sites number them; others are not measured.
        progress: called after every image.

    Raises:
        DataError: there are no images.
        NumericalError: NaN or infinite weights or activations, naming the image by its number.

    Cost: one forward of tower and projector, 2 n^2 flop per token and input of width n. Memory:
    both, embeddings, and n^2 float64 of every input.
    """
    sites = [s for s in skeleton.image_parts if s.block in blocks and s.name == s.input_site]
    device = skeleton.device
    meters = {s.name: Meter(InputAccumulator(s.name, s.shape[1], device)) for s in sites}
    handles = [
        skeleton.image_linear(site).register_forward_pre_hook(meters[site.name], with_kwargs=True)
        for site in sites
    ]
    seen = 0
    try:
        with skeleton.loaded_outside(head=False) as model, torch.no_grad():
            for image in images:
                for meter in meters.values():
                    meter.samples = range(seen, seen + 1)
                _run(model, image, skeleton)
                seen += 1
                if progress is not None:
                    progress()
    finally:
        for handle in handles:
            handle.remove()
    if not seen:
        raise DataError("there are no images to calibrate tower and projector on")
    found: dict[int, dict[str, InputStatistics]] = defaultdict(dict)
    for site in sites:
        found[site.block][site.name] = meters[site.name].accumulator.finish()
    return dict(found)


def _run(model: Any, image: Mapping[str, Tensor], skeleton: Skeleton) -> None:
    sizes = image.get("image_sizes")
    extra = {} if sizes is None else {"image_sizes": sizes.to(skeleton.device)}
    pixels = image["pixel_values"].to(skeleton.device, skeleton.dtype)
    model.get_image_features(pixel_values=pixels, **extra)
