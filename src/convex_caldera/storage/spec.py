"""The spec of a stored layer: plain data that says what its tensors mean.

    {"shape": [m, n],
     "transforms": [{"transform": record, "tensors": {field: [dtype, shape]}}, ...],
     "terms": [{"kind": "coded", "quantizer": record, "tensors": {..., "codes": ["U8", [bytes]]}},
               {"kind": "low_rank", "rank": r, "left": factor, "right": factor}]}

where a factor is {"kind": "dense"} or coded. Layers of one shape and recipe share one spec.
docs/format.md is normative.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from convex_caldera import quantizers, transforms
from convex_caldera.errors import FormatError, RecipeError
from convex_caldera.recipes.records import canonical_json, from_record, to_record
from convex_caldera.storage.shard import ALIGNMENT, DTYPES

Spec = dict[str, Any]
Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # field -> dtype, shape
Owner = tuple[str | int, ...]  # ("terms", 1, "left"): a place in the spec

PACKED = "packed"
CODES = "codes"
MAX_FEATURES = 1 << 31
FACTOR_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TABLES: dict[str, Mapping[str, type]] = {
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


def check_spec(spec: Any) -> Spec:
    """A spec read from a file, if it is exactly one that `layer_to_tensors` could have made.

    Raises FormatError for unknown keys or kinds, non-canonical records and absurd shapes.
    """
    _keys(spec, {"shape", "transforms", "terms"}, "spec")
    shape = spec["shape"]
    if not _is_shape(shape) or len(shape) != 2 or not all(0 < s < MAX_FEATURES for s in shape):
        raise FormatError(f"spec: shape {shape!r} is not two positive sizes")
    if not isinstance(spec["transforms"], list) or not isinstance(spec["terms"], list):
        raise FormatError("spec: transforms and terms must be lists")
    if not spec["terms"]:
        raise FormatError("spec: a layer without terms would decode to zeros")
    for item in spec["transforms"]:
        _check_owner(item, {"transform", "tensors"}, "transform")
    for item in spec["terms"]:
        _check_term(item, shape)
    return spec


def _check_term(item: Any, shape: list[int]) -> None:
    kind = item.get("kind") if isinstance(item, dict) else None
    if kind == "coded":
        return _check_owner(item, {"kind", "quantizer", "tensors"}, "quantizer")
    if kind != "low_rank":
        raise FormatError(f"spec: unknown kind of term {kind!r}")
    _keys(item, {"kind", "rank", "left", "right"}, "low_rank")
    if type(item["rank"]) is not int or not 0 < item["rank"] <= min(shape):
        raise FormatError(f"spec: rank {item['rank']!r} is not in 1 .. {min(shape)}")
    for side in ("left", "right"):
        factor = item[side]
        if isinstance(factor, dict) and factor.get("kind") == "coded":
            _check_owner(factor, {"kind", "quantizer", "tensors"}, "quantizer")
        elif factor != {"kind": "dense"}:
            raise FormatError(f"spec: a factor is dense or coded, got {str(factor)[:60]!r}")


def _check_owner(item: Any, keys: set[str], role: str) -> None:
    _keys(item, keys, role)
    try:
        rebuilt = to_record(from_record(item[role], TABLES[role]))
    except RecipeError as error:
        raise FormatError(f"spec: {error}") from error
    if canonical_json(rebuilt) != canonical_json(item[role]):
        raise FormatError(f"spec: the record of a {role} is not in canonical form")
    tensors = item["tensors"]
    if not isinstance(tensors, dict) or (role == "quantizer" and CODES not in tensors):
        raise FormatError(f"spec: a {role} needs its tensors")
    for name, description in tensors.items():
        pair = isinstance(description, list) and len(description) == 2
        if not pair or str(description[0]) not in DTYPES or not _is_shape(description[1]):
            raise FormatError(f"spec: {name!r} needs [dtype, shape], got {str(description)[:60]}")
    if role == "quantizer" and (tensors[CODES][0] != "U8" or len(tensors[CODES][1]) != 1):
        raise FormatError("spec: packed codes are a flat U8 tensor")


def _keys(item: Any, keys: set[str], where: str) -> None:
    if not isinstance(item, dict) or set(item) != keys:
        got = sorted(item) if isinstance(item, dict) else type(item).__name__
        raise FormatError(f"spec: {where} needs exactly {sorted(keys)}, got {got}")


def _is_shape(value: Any) -> bool:
    if not isinstance(value, list) or len(value) > 4:
        return False
    return all(type(size) is int and 0 <= size < 1 << 40 for size in value)
