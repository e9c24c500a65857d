"""Where the bytes of an output directory went, read from the headers of its files.

Everything that is neither codes, factors, scales nor signs of a layer is header: the JSON of the
shard, its padding, and the padding of `packed`. The parts of all kinds add up to the files.
"""

from __future__ import annotations

import math
from collections import defaultdict

from convex_caldera.report.names import place_of
from convex_caldera.storage.read import Container
from convex_caldera.storage.spec import CODES, PACKED, Part, Spec, packed_parts, spec_layout

PARTS = ("codes", "factors", "scales and tables", "signs", "headers", "kept as it was")
FILE_HEADERS = "(file headers)"
REST = "(not compressed)"


def byte_parts(container: Container) -> dict[str, dict[str, int]]:
    """Matrix kind -> part -> bytes; `FILE_HEADERS` and `REST` hold what belongs to no layer.

    The sum over everything is `container.sizes().file_bytes`.
    """
    kinds: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for name, (_, spec) in container.layers.items():
        for part, size in layer_parts(spec).items():
            kinds[place_of(name).kind][part] += size
    sizes = container.sizes()
    in_layers = sum(size for parts in kinds.values() for size in parts.values())
    kinds[FILE_HEADERS]["headers"] = sizes.compressed_bytes - in_layers
    kinds[REST]["kept as it was"] = sizes.rest_bytes
    return {kind: dict(parts) for kind, parts in kinds.items()}


def layer_parts(spec: Spec) -> dict[str, int]:
    """Part -> bytes of one layer's tensors."""
    sizes: dict[str, int] = defaultdict(int)
    for part in packed_parts(spec):
        sizes[_what(part)] += part.num_bytes
    for field, (dtype, shape) in spec_layout(spec).items():
        if field == PACKED:
            sizes["headers"] += shape[0] - sum(p.num_bytes for p in packed_parts(spec))
        else:
            sizes["factors"] += math.prod(shape) * dtype.itemsize
    return dict(sizes)


def _what(part: Part) -> str:
    if len(part.owner) == 3:  # ("terms", i, "left"): codes and scale of a factor
        return "factors"
    if part.field == CODES:
        return "codes"
    return "signs" if part.field.endswith("signs") else "scales and tables"
