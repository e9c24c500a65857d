"""Shards of compressed layers: their layout, their exact size, and reading them back.

A shard's metadata holds one JSON text under "convex_caldera": the distinct specs as `schemes`
writes them and, for each layer in the order of the names, which of them it follows. Layer names
are those of the tensors, `<layer>.<field>`, so that nothing is written twice. All of this depends
on specs alone; a planner knows the bytes of a file before any weight is compressed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from convex_caldera.errors import FormatError
from convex_caldera.recipes.records import canonical_json
from convex_caldera.storage.schemes import compact, expand
from convex_caldera.storage.shard import (
    NAMES,
    Header,
    TensorInfo,
    parse_json,
    shard_bytes,
)
from convex_caldera.storage.spec import FACTOR_DTYPES, PACKED, Layout, Spec, spec_layout

FORMAT_VERSION = 1
METADATA_KEY = "convex_caldera"
MAX_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class LayerEntry:
    """A layer to be stored: its name, spec, and dtype and shape of each of its tensors."""

    name: str
    spec: Spec
    layout: Layout

    def infos(self) -> list[TensorInfo]:
        """Its tensors as they are named in a file."""
        return [
            TensorInfo(f"{self.name}.{field}", NAMES[dtype], tuple(shape))
            for field, (dtype, shape) in self.layout.items()
        ]


@dataclass(frozen=True)
class ShardPlan:
    """The layers of one file, its tensors in file order, and its metadata."""

    layers: tuple[str, ...]
    infos: list[TensorInfo]
    metadata: dict[str, str]

    @property
    def num_bytes(self) -> int:
        return shard_bytes(self.infos, self.metadata)


def plan_shards(
    entries: Iterable[LayerEntry], max_shard_bytes: int = MAX_SHARD_BYTES
) -> list[ShardPlan]:
    """Distribute layers over files in the order of their names; a layer is never split.

    A file's tensors stay below `max_shard_bytes`, unless one layer alone is larger.
    """
    groups: list[list[LayerEntry]] = []
    filled = 0
    for entry in sorted(entries, key=lambda e: e.name):
        size = sum(info.num_bytes for info in entry.infos())
        if not groups or filled + size > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(entry)
        filled += size
    return [_plan(group) for group in groups]


def planned_shard_bytes(
    entries: Iterable[LayerEntry], max_shard_bytes: int = MAX_SHARD_BYTES
) -> int:
    """Total size of the compressed shards for these layers, headers included, to the byte."""
    return sum(plan.num_bytes for plan in plan_shards(entries, max_shard_bytes))


def shard_metadata(specs: Mapping[str, Spec], explicit_names: bool = False) -> dict[str, str]:
    """`__metadata__` for layers by name.

    `explicit_names` writes {name: scheme} for files that hold other tensors too, as those of
    `save_pretrained` do.
    """
    distinct: dict[str, Spec] = {}
    texts = {name: canonical_json(specs[name]) for name in sorted(specs)}
    for name, text in texts.items():
        distinct.setdefault(text, specs[name])
    number = {text: i for i, text in enumerate(distinct)}
    numbers = {name: number[text] for name, text in texts.items()}
    records, schemes = compact(list(distinct.values()))
    record = {
        "layers": numbers if explicit_names else list(numbers.values()),
        "records": records,
        "schemes": schemes,
        "version": FORMAT_VERSION,
    }
    return {"format": "pt", METADATA_KEY: canonical_json(record)}


def file_order(info: TensorInfo) -> tuple[bool, int, str]:
    """Sort key: `packed` first (multiples of eight bytes), then by falling element size."""
    return (not info.name.endswith("." + PACKED), -info.element_bytes, info.name)


def layer_specs(header: Header) -> dict[str, Spec]:
    """The layers of a file and their specs, checked against the tensors of the file.

    A file without our metadata has none. With names given explicitly, tensors of the same layer
    may lie in other files; `check_layer_tensors` is then the caller's duty.

    Raises:
        FormatError: metadata malformed or of another version, unknown schemes, tensors missing,
            superfluous, or not of the dtype and shape that the spec asks for.
    """
    text = header.metadata.get(METADATA_KEY)
    if text is None:
        return {}
    file = header.path.name
    record = parse_json(text, file)
    if not isinstance(record, dict) or set(record) != {"layers", "records", "schemes", "version"}:
        raise FormatError(f"{file}: metadata needs exactly layers, records, schemes and version")
    if type(record["version"]) is not int or record["version"] != FORMAT_VERSION:
        raise FormatError(
            f"{file}: format version {record['version']!r}; this program reads {FORMAT_VERSION}"
        )
    try:
        schemes = expand(record["records"], record["schemes"], header.path.stat().st_size)
    except FormatError as error:
        raise FormatError(f"{file}: {error}") from error
    if isinstance(record["layers"], dict):
        return {n: schemes[_index(k, schemes, file)] for n, k in record["layers"].items()}
    names = sorted({name.rpartition(".")[0] for name in header.entries})
    if not isinstance(record["layers"], list):
        raise FormatError(f"{file}: layers must be a list or a table")
    numbers = [_index(number, schemes, file) for number in record["layers"]]
    if len(names) != len(numbers) or set(numbers) != set(range(len(schemes))):
        raise FormatError(f"{file}: {len(names)} layers, {len(numbers)} scheme numbers")
    specs = {name: schemes[number] for name, number in zip(names, numbers, strict=True)}
    infos = {name: entry.info for name, entry in header.entries.items()}
    for name in names:
        check_layer_tensors(name, specs[name], infos)
    if len(infos) != sum(len(spec_layout(spec)) for spec in specs.values()):
        raise FormatError(f"{file}: holds tensors that belong to no layer")
    return specs


def check_layer_tensors(name: str, spec: Spec, infos: Mapping[str, TensorInfo]) -> None:
    """Raise FormatError unless all tensors of a layer are there with the right dtype and shape."""
    for field, (dtype, shape) in spec_layout(spec).items():
        info = infos.get(f"{name}.{field}")
        allowed = {NAMES[dtype]} if field == PACKED else {NAMES[d] for d in FACTOR_DTYPES}
        if info is None or info.shape != tuple(shape) or info.dtype not in allowed:
            got = "nothing" if info is None else f"{info.dtype} {info.shape}"
            raise FormatError(f"{name}.{field}: expected {NAMES[dtype]} {shape}, got {got}")


def _plan(group: Sequence[LayerEntry]) -> ShardPlan:
    infos = sorted((info for entry in group for info in entry.infos()), key=file_order)
    metadata = shard_metadata({entry.name: entry.spec for entry in group})
    return ShardPlan(tuple(entry.name for entry in group), infos, metadata)


def _index(value: Any, schemes: list[Spec], file: str) -> int:
    if type(value) is not int or not 0 <= value < len(schemes):
        raise FormatError(f"{file}: scheme number {value!r} of {len(schemes)}")
    return value
