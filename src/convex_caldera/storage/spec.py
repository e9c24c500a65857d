"""The spec of a stored layer: plain data that says what its tensors mean.

    {"shape": [m, n],
     "transforms": [{"transform": record, "tensors": {field: [dtype, shape]}}, ...],
     "terms": [{"kind": "coded", "quantizer": record, "tensors": {..., "codes": ["U8", [bytes]]}},
               {"kind": "low_rank", "rank": r, "left": factor, "right": factor}]}

where a factor is {"kind": "dense"} or coded. A coded item whose codes are entropy-coded also has
"coder": record, and "codes" is as long as they happen to be. Layers of one shape and recipe share
one spec, unless their codes are entropy-coded. In files specs are written more shortly, see
`schemes`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from convex_caldera import coding, quantizers, transforms
from convex_caldera.core.protocols import Coder, Quantizer, Transform
from convex_caldera.recipes.records import to_record
from convex_caldera.storage.shard import ALIGNMENT, DTYPES, NAMES

Spec = dict[str, Any]
Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # field -> dtype, shape
Owner = tuple[str | int, ...]  # ("terms", 1, "left"): a place in the spec

PACKED = "packed"
CODES = "codes"
MAX_FEATURES = 1 << 31
FACTOR_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TABLES: dict[str, Mapping[str, type]] = {
    "coder": coding.TABLE,
    "quantizer": quantizers.TABLE,
    "transform": transforms.TABLE,
}


@dataclass(frozen=True)
class Part:
    """One slice of `packed`: where it belongs, and its dtype and shape."""

    owner: Owner
    field: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def packed_parts(spec: Spec) -> list[Part]:
    """The parts of `packed` in file order: widest elements first, then as the spec lists them."""
    parts = [
        Part(owner, field, DTYPES[dtype], tuple(shape))
        for owner, tensors in owners(spec)
        for field, (dtype, shape) in sorted(tensors.items())
    ]
    return sorted(parts, key=lambda part: -part.dtype.itemsize)


def owners(spec: Spec) -> Iterator[tuple[Owner, Spec]]:
    for i, transform in enumerate(spec["transforms"]):
        yield ("transforms", i), transform["tensors"]
    for i, term in enumerate(spec["terms"]):
        if term["kind"] == "coded":
            yield ("terms", i), term["tensors"]
        else:
            for side in ("left", "right"):
                if term[side]["kind"] == "coded":
                    yield ("terms", i, side), term[side]["tensors"]


def padding(parts: list[Part]) -> int:
    return -sum(part.num_bytes for part in parts) % ALIGNMENT


def spec_layout(spec: Spec, factor_dtype: torch.dtype = torch.float16) -> Layout:
    """Dtype and shape of every tensor that a spec asks for."""
    m, n = spec["shape"]
    layout: Layout = {}
    parts = packed_parts(spec)
    if parts:
        total = sum(part.num_bytes for part in parts) + padding(parts)
        layout[PACKED] = (torch.uint8, (total,))
    for i, term in enumerate(spec["terms"]):
        if term["kind"] == "low_rank":
            for side, factor_shape in (("left", (m, term["rank"])), ("right", (term["rank"], n))):
                if term[side]["kind"] == "dense":
                    layout[f"{side}_{i}"] = (factor_dtype, factor_shape)
    return layout


def coded_spec(
    quantizer: Quantizer,
    shape: tuple[int, int],
    coder: Coder | None = None,
    coded_bytes: int = 0,
) -> Spec:
    """The item of a coded term or factor of `shape`; its codes in `coded_bytes` by `coder`."""
    spec = {
        "kind": "coded",
        "quantizer": to_record(quantizer),
        "tensors": _layout(quantizer, shape),
    }
    if coder is not None:
        spec["coder"] = to_record(coder)
        spec["tensors"][CODES] = [NAMES[torch.uint8], [coded_bytes]]
    return spec


def transform_spec(transform: Transform, shape: tuple[int, int]) -> Spec:
    """The item of a transform of a layer of `shape`."""
    return {"transform": to_record(transform), "tensors": _layout(transform, shape)}


def _layout(owner: Quantizer | Transform, shape: tuple[int, int]) -> Spec:
    layout = sorted(owner.layout(shape).items())
    return {name: [NAMES[dtype], list(size)] for name, (dtype, size) in layout}
