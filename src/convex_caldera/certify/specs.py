"""What a shard's metadata says of its layers: transforms, terms, and the parts of `packed`.

`__metadata__["convex_caldera"]` is the JSON text of

    {"layers": [number, ...], "records": [record, ...], "schemes": [scheme, ...], "version": 1}

    scheme   [m, n, [transform, ...], [term, ...]]
    term     k                     coded by records[k]
             [k, [c, bytes]]       the same, codes entropy-coded by records[c] in so many bytes
             [rank, left, right]   low rank; a factor is written as a coded term, or null: dense

the layers in the order of their names, each with the number of its scheme; a transform is the
number of a record. Names are those of the tensors, `<layer>.<field>`. A coded left factor is
stored transposed, (rank, m). Everything but dense factors lies in one tensor `packed`: parts with
the widest elements first, else in the order transforms, terms, left before right, fields by
name; zeros up to a multiple of 8 bytes. docs/format.md, sections 2 and 3, is normative.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from convex_caldera.certify.codec import (
    Layout,
    QuantizerFormat,
    Record,
    Shape,
    TransformFormat,
    check_record,
)
from convex_caldera.certify.decode_entropy import CODERS
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
MOST_WEIGHTS_A_BYTE = 64
MOST_CODED_WEIGHTS_A_BYTE = 1 << 20


@dataclass(frozen=True)
class Coded:
    """A record (quantizer or transform), the shape it applies to, and its stored tensors.

    `coder` is the record of the entropy coder of its codes, whose fixed width is `code_bytes`.
    """

    record: Record
    shape: Shape
    tensors: Layout
    coder: Record | None = None
    code_bytes: int = 0


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
    keys = ("layers", "records", "schemes", "version")
    record = table(parse(text.encode(), where), keys, where)
    if type(record["version"]) is not int or record["version"] != VERSION:
        raise FormatError(f"{where}: format version {short(record['version'])}, not {VERSION}")
    schemes = read_schemes(record["records"], record["schemes"], shard.size, where)
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


def read_schemes(records: Any, schemes: Any, file_bytes: int, where: str) -> list[LayerSpec]:
    """All schemes of a file; every record used, none twice. Raises FormatError."""
    known = _Records(listing(records, f"{where}: records"), file_bytes, where)
    found = [
        _scheme(scheme, known, f"{where}: scheme {i}")
        for i, scheme in enumerate(listing(schemes, f"{where}: schemes"))
    ]
    texts = {json.dumps(record, sort_keys=True) for record in known.records}
    if len(texts) != len(known.records) or known.used != set(range(len(known.records))):
        raise FormatError(f"{where}: a record appears twice, or is never used")
    return found


class _Records:
    """The records of a file by number; remembers which were used."""

    def __init__(self, records: list[Any], file_bytes: int, where: str):
        self.records, self.file_bytes, self.where = records, file_bytes, where
        self.used: set[int] = set()

    def coded(
        self,
        number: Any,
        shape: Shape,
        formats: Mapping[str, QuantizerFormat] | Mapping[str, TransformFormat],
        most: int = MOST_WEIGHTS_A_BYTE,
    ) -> Coded:
        """The record of that number applied to a matrix of `shape`."""
        record = self.record(number, formats)
        if shape[0] * shape[1] > most * self.file_bytes:
            raise FormatError(
                f"{self.where}: {shape} is too large for a file of {self.file_bytes} bytes"
            )
        return Coded(record, shape, formats[record["kind"]].layout(record, shape))

    def quantized(self, item: Any, shape: Shape) -> Coded:
        """A coded term or factor: k, or [k, [c, bytes]] where its codes are entropy-coded."""
        if not isinstance(item, list):
            return self.coded(item, shape, QUANTIZERS)
        if len(item) != 2 or not isinstance(item[1], list) or len(item[1]) != 2:
            raise FormatError(f"{self.where}: a coded term is k or [k, [coder, bytes]]")
        plain = self.coded(item[0], shape, QUANTIZERS, MOST_CODED_WEIGHTS_A_BYTE)
        coder = self.record(item[1][0], CODERS)
        size = natural(item[1][1], f"{self.where}: bytes of codes", self.file_bytes)
        (fixed,) = plain.tensors["codes"][1]
        tensors = {**plain.tensors, "codes": ("U8", (size,))}
        return Coded(plain.record, shape, tensors, coder, fixed)

    def record(self, number: Any, formats: Mapping[str, Any]) -> Record:
        """The record of that number, of one of these kinds and with possible options."""
        k = natural(number, f"{self.where}: record number", len(self.records) - 1)
        record, where = self.records[k], f"{self.where}: record {k}"
        kind = record.get("kind") if isinstance(record, dict) else None
        if not isinstance(kind, str) or kind not in formats:
            raise FormatError(f"{where}: the kind {short(kind)} is unknown here")
        check_record(record, formats[kind].options, where)
        self.used.add(k)
        return record


def _scheme(value: Any, known: _Records, where: str) -> LayerSpec:
    scheme = listing(value, where)
    if len(scheme) != 4:
        raise FormatError(f"{where}: a scheme is [m, n, transforms, terms]")
    m, n = (natural(side, f"{where}: shape", MAX_SIDE) for side in scheme[:2])
    if not m or not n:
        raise FormatError(f"{where}: a shape is two positive sizes")
    transforms = tuple(known.coded(k, (m, n), TRANSFORMS) for k in listing(scheme[2], where))
    terms = tuple(_term(item, (m, n), known, where) for item in listing(scheme[3], where))
    if not terms:
        raise FormatError(f"{where}: a layer without terms would decode to zeros")
    return LayerSpec((m, n), transforms, terms)


def _term(item: Any, shape: Shape, known: _Records, where: str) -> Coded | LowRank:
    if not isinstance(item, list) or len(item) == 2:
        return known.quantized(item, shape)
    if len(item) != 3:
        raise FormatError(f"{where}: a low-rank term is [rank, left, right]")
    rank = natural(item[0], f"{where}: rank", min(shape))
    if rank == 0:
        raise FormatError(f"{where}: rank 0 is not stored")
    left, right = (
        None if side is None else known.quantized(side, (rank, width))
        for side, width in zip(item[1:], shape, strict=True)
    )
    return LowRank(rank, left, right)
