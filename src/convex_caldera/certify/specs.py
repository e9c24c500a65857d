"""What a shard's metadata says of its layers: transforms, terms, and the parts of `packed`.

`__metadata__["convex_caldera"]` is the JSON text of {"layers": [number, ...], "schemes": [spec,
...], "version": 1}: the layers in the order of their names, each with the number of its spec.
Names are those of the tensors, `<layer>.<field>`.

    {"shape": [m, n],
     "transforms": [{"transform": record, "tensors": {field: [dtype, shape]}}, ...],
     "terms": [{"kind": "coded", "quantizer": record, "tensors": {..., "codes": ["U8", [bytes]]}},
               {"kind": "low_rank", "rank": r, "left": factor, "right": factor}]}

A factor is {"kind": "dense"} or coded; a coded left is stored transposed, (rank, m). Everything
but dense factors lies in one tensor `packed`: parts with the widest elements first, else in the
order transforms, terms, left before right, fields by name; zeros up to a multiple of 8 bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from convex_caldera.certify.codec import Layout, Record, Shape, check_record
from convex_caldera.certify.decode_table import QUANTIZERS, TRANSFORMS
from convex_caldera.certify.shard import ELEMENT_BYTES, Shard
from convex_caldera.certify.strict import listing, natural, parse, short, table
from convex_caldera.errors import FormatError

METADATA_KEY = "convex_caldera"
VERSION = 1
ALIGNMENT = 8
MAX_SIDE = (1 << 31) - 1
PACKED = "packed"
FACTOR_DTYPES = ("F16", "BF16", "F32")
DENSE = {"kind": "dense"}


@dataclass(frozen=True)
class Coded:
    """A record (quantizer or transform), the shape it applies to, and its stored tensors."""

    record: Record
    shape: Shape
    tensors: Layout


@dataclass(frozen=True)
class LowRank:
    """left and right are None where the factor is dense."""

    rank: int
    left: Coded | None
    right: Coded | None


@dataclass(frozen=True)
class LayerSpec:
    """A checked spec. `tensors` are the dtypes and shapes that the shard must hold by field."""

    shape: Shape
    transforms: tuple[Coded, ...]
    terms: tuple[Coded | LowRank, ...]

    @property
    def rank(self) -> int:
        return sum(term.rank for term in self.terms if isinstance(term, LowRank))

    @property
    def owners(self) -> list[Coded]:
        """Everything whose tensors lie in `packed`, in the order of the spec."""
        found = list(self.transforms)
        for term in self.terms:
            sides = [term] if isinstance(term, Coded) else [term.left, term.right]
            found += [side for side in sides if side is not None]
        return found

    @property
    def parts(self) -> list[tuple[int, str, str, tuple[int, ...]]]:
        """(owner, field, dtype, shape) in file order."""
        listed = [
            (i, field, dtype, shape)
            for i, owner in enumerate(self.owners)
            for field, (dtype, shape) in sorted(owner.tensors.items())
        ]
        return sorted(listed, key=lambda part: -ELEMENT_BYTES[part[2]])

    @property
    def used_bytes(self) -> int:
        """Bytes of the parts of `packed`."""
        return sum(math.prod(shape) * ELEMENT_BYTES[dtype] for _, _, dtype, shape in self.parts)

    @property
    def padding(self) -> int:
        """Zero bytes after the last part."""
        return -self.used_bytes % ALIGNMENT

    @property
    def tensors(self) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
        """Field -> possible dtypes, shape."""
        m, n = self.shape
        found: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {}
        if self.parts:
            found[PACKED] = (("U8",), (self.used_bytes + self.padding,))
        for i, term in enumerate(self.terms):
            if isinstance(term, LowRank):
                if term.left is None:
                    found[f"left_{i}"] = (FACTOR_DTYPES, (m, term.rank))
                if term.right is None:
                    found[f"right_{i}"] = (FACTOR_DTYPES, (term.rank, n))
        return found


def layer_specs(shard: Shard) -> dict[str, LayerSpec] | None:
    """The layers of a shard by name, checked against its tensors; None if it holds other things."""
    text = shard.metadata.get(METADATA_KEY)
    if text is None:
        return None
    where = shard.name
    record = table(parse(text.encode(), where), ("layers", "schemes", "version"), where)
    if type(record["version"]) is not int or record["version"] != VERSION:
        raise FormatError(f"{where}: format version {short(record['version'])}, not {VERSION}")
    schemes = [
        read_spec(scheme, f"{where}: scheme {i}")
        for i, scheme in enumerate(listing(record["schemes"], where))
    ]
    names = sorted({name.rpartition(".")[0] for name in shard.entries})
    numbers = [
        natural(number, f"{where}: layers", len(schemes) - 1)
        for number in listing(record["layers"], f"{where}: layers")
    ]
    if len(names) != len(numbers) or set(numbers) != set(range(len(schemes))):
        raise FormatError(f"{where}: {len(names)} layers and {len(numbers)} scheme numbers")
    specs = {name: schemes[number] for name, number in zip(names, numbers, strict=True)}
    _check_tensors(shard, specs)
    return specs


def _check_tensors(shard: Shard, specs: dict[str, LayerSpec]) -> None:
    wanted = 0
    for name, spec in specs.items():
        for field, (dtypes, shape) in spec.tensors.items():
            wanted += 1
            entry = shard.entries.get(f"{name}.{field}")
            if entry is None or entry.shape != shape or entry.dtype not in dtypes:
                got = "nothing" if entry is None else f"{entry.dtype} {entry.shape}"
                raise FormatError(f"{shard.name}: {short(name)}.{field} must be {shape}, got {got}")
    if wanted != len(shard.entries):
        raise FormatError(f"{shard.name}: holds tensors that belong to no layer")


def read_spec(value: Any, where: str) -> LayerSpec:
    """A spec read from a file. Raises FormatError for anything that the format does not have."""
    spec = table(value, ("shape", "transforms", "terms"), where)
    sides = listing(spec["shape"], where)
    if len(sides) != 2 or 0 in sides:
        raise FormatError(f"{where}: a shape is two positive sizes")
    m, n = (natural(side, f"{where}: shape", MAX_SIDE) for side in sides)
    transforms = [
        _transform(item, (m, n), f"{where}: transform {i}")
        for i, item in enumerate(listing(spec["transforms"], where))
    ]
    terms = [
        _term(item, (m, n), f"{where}: term {i}")
        for i, item in enumerate(listing(spec["terms"], where))
    ]
    if not terms:
        raise FormatError(f"{where}: a layer without terms would decode to zeros")
    return LayerSpec((m, n), tuple(transforms), tuple(terms))


def _term(item: Any, shape: Shape, where: str) -> Coded | LowRank:
    kind = item.get("kind") if isinstance(item, dict) else None
    if kind == "coded":
        return _coded(item, shape, where)
    table(item, ("kind", "rank", "left", "right"), where)
    if kind != "low_rank":
        raise FormatError(f"{where}: unknown kind {short(kind)}")
    rank = natural(item["rank"], f"{where}: rank", min(shape))
    if rank == 0:
        raise FormatError(f"{where}: rank 0 is not stored")
    sides = [
        None if item[side] == DENSE else _coded(item[side], (rank, width), f"{where}: {side}")
        for side, width in (("left", shape[0]), ("right", shape[1]))
    ]
    return LowRank(rank, *sides)


def _coded(item: Any, shape: Shape, where: str) -> Coded:
    table(item, ("kind", "quantizer", "tensors"), where)
    if item["kind"] != "coded":
        raise FormatError(f"{where}: a factor is dense or coded")
    record = item["quantizer"]
    known = QUANTIZERS.get(_kind(record, where))
    if known is None:
        raise FormatError(f"{where}: unknown quantizer {short(record['kind'])}")
    check_record(record, known.options, where)
    return _with_tensors(item, record, shape, known.layout(record, shape), where)


def _transform(item: Any, shape: Shape, where: str) -> Coded:
    table(item, ("transform", "tensors"), where)
    record = item["transform"]
    known = TRANSFORMS.get(_kind(record, where))
    if known is None:
        raise FormatError(f"{where}: unknown transform {short(record['kind'])}")
    check_record(record, known.options, where)
    return _with_tensors(item, record, shape, known.layout(record, shape), where)


def _kind(record: Any, where: str) -> str:
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        raise FormatError(f"{where}: a record needs a kind")
    kind: str = record["kind"]
    return kind


def _with_tensors(item: Any, record: Record, shape: Shape, layout: Layout, where: str) -> Coded:
    expected = {name: [dtype, list(size)] for name, (dtype, size) in layout.items()}
    if item["tensors"] != expected:
        raise FormatError(f"{where}: the stored tensors are not those of its record and shape")
    return Coded(record, shape, layout)
