"""Reading an output directory: strict, lazy, one layer at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from convex_caldera.core.terms import CompressedLayer
from convex_caldera.errors import ConvexCalderaError, FormatError
from convex_caldera.recipes.activations import parse_activations
from convex_caldera.recipes.records import from_toml
from convex_caldera.storage.codec import layer_from_tensors, lent_decoder
from convex_caldera.storage.files import inside
from convex_caldera.storage.layers import FORMAT_VERSION, METADATA_KEY, layer_specs
from convex_caldera.storage.lending import Lend
from convex_caldera.storage.lossless import SUFFIX, lossless_infos, read_lossless
from convex_caldera.storage.manifest import FOLDER, check_manifest
from convex_caldera.storage.shard import (
    Header,
    TensorInfo,
    bytes_as_tensor,
    parse_json,
    read_header,
    read_raw,
    read_tensor,
)
from convex_caldera.storage.source import INDEX
from convex_caldera.storage.spec import PACKED, Spec, spec_layout

QUANT_METHOD = "convex_caldera"


@dataclass(frozen=True)
class Sizes:
    """What an output directory takes, from the files themselves.

    `lossless_saved_bytes` are what entropy coding saved on tensors that are kept bit for bit.
    `file_bytes` are the safetensors shards; bits are these bytes * 8 over original weights.
    """

    compressed_bytes: int
    rest_bytes: int
    compressed_weights: int
    all_weights: int
    lossless_saved_bytes: int = 0

    @property
    def file_bytes(self) -> int:
        return self.compressed_bytes + self.rest_bytes

    @property
    def bits_per_compressed_weight(self) -> float:
        """Bytes of the compressed shards * 8 / weights of the compressed layers."""
        return self.compressed_bytes * 8 / self.compressed_weights

    @property
    def bits_per_weight(self) -> float:
        """Bytes of all shards * 8 / weights of the whole model."""
        return self.file_bytes * 8 / self.all_weights


@dataclass(frozen=True, eq=False)
class Container:
    """An opened output directory: what is where, checked, with nothing decoded yet.

    `layers` maps the name of a compressed layer to (header of its file, spec); `rest` maps the
    names of all other tensors to the header of their file, and `lossless` those of them that are
    stored with their exponents coded to what they are once decoded.
    """

    directory: Path
    config: dict[str, Any]
    layers: dict[str, tuple[Header, Spec]]
    rest: dict[str, Header]
    lossless: dict[str, TensorInfo] = field(default_factory=dict)

    @property
    def activations(self) -> str | None:
        """Formats that activations are rounded to (`recipes.activations`); None if they are not."""
        found: str | None = self.config["quantization_config"].get("activations")
        return found

    def layer(self, name: str) -> CompressedLayer:
        """Read and decode the description of one layer. Raises FormatError if it is damaged."""
        if name not in self.layers:
            raise FormatError(f"{self.directory.name}: has no compressed layer {name!r}")
        header, spec = self.layers[name]
        return read_layer(header, name, spec, self.lend)

    def lend(self, name: str) -> Mapping[str, Tensor]:
        """The decoder that a layer stores for others. Raises FormatError if there is none."""
        if name not in self.layers:
            raise FormatError(f"{self.directory.name}: no layer {name!r} to borrow a decoder from")
        header, spec = self.layers[name]
        return lent_decoder(spec, read_tensor(header, f"{name}.{PACKED}"))

    def tensor(self, name: str) -> Tensor:
        """One of the tensors that were kept as they were."""
        if name not in self.lossless:
            return read_tensor(self.rest[name], name)
        return bytes_as_tensor(self.raw(name), self.lossless[name])

    def raw(self, name: str) -> bytearray:
        """The bytes of one of the tensors that were kept, as they were."""
        if name in self.lossless:
            return read_lossless(self.rest[name], self.lossless[name])
        return read_raw(self.rest[name], name)

    def rest_info(self, name: str) -> TensorInfo:
        """Dtype and shape of one of the tensors that were kept."""
        return self.lossless.get(name) or self.rest[name].entries[name].info

    def sizes(self) -> Sizes:
        """Bytes and weights, counted from the files."""
        compressed = {header.path for header, _ in self.layers.values()}
        kept = {header.path for header in self.rest.values()}
        weights = sum(spec["shape"][0] * spec["shape"][1] for _, spec in self.layers.values())
        elements = [self.rest_info(name) for name in self.rest]
        saved = sum(
            info.num_bytes - self.rest[name].entries[name + SUFFIX].info.num_bytes
            for name, info in self.lossless.items()
        )
        return Sizes(
            compressed_bytes=sum(path.stat().st_size for path in compressed),
            rest_bytes=sum(path.stat().st_size for path in kept),
            compressed_weights=weights,
            all_weights=weights + sum(i.num_bytes // i.element_bytes for i in elements),
            lossless_saved_bytes=saved,
        )

    def report(self) -> dict[str, Any]:
        """convex_caldera/report.json."""
        return _json(self.directory, f"{FOLDER}/report.json")

    def recipe(self) -> dict[str, Any]:
        """convex_caldera/recipe.toml as a plain dict."""
        return _toml(self.directory, f"{FOLDER}/recipe.toml")


def open_container(directory: Path | str, verify: bool = True) -> Container:
    """Open an output directory.

    Args:
        directory: written by `assemble`.
        verify: hash every file first and compare with the manifest. Without it the structure is
            still checked in full, but a flipped bit in a tensor goes unnoticed.

    Raises:
        FormatError: for every deviation from docs/format.md; the message names the file.

    Cost: with `verify` one SHA-256 over all files; otherwise the headers are read.
    """
    path = Path(directory)
    if not path.is_dir():
        raise FormatError(f"{path.name}: no such directory")
    if verify:
        check_manifest(path)
    config = _json(path, "config.json")
    _check_config(config)
    headers = _headers(path)
    layers: dict[str, tuple[Header, Spec]] = {}
    rest: dict[str, Header] = {}
    lossless: dict[str, TensorInfo] = {}
    for header in headers:
        coded = lossless_infos(header)
        if METADATA_KEY in header.metadata:
            for name, spec in layer_specs(header).items():
                if name in layers:
                    raise FormatError(f"{header.path.name}: layer {name!r} appears twice")
                layers[name] = (header, spec)
        else:
            names = header.entries if coded is None else coded
            twice = sorted(set(names) & set(rest))
            if twice:
                raise FormatError(f"{header.path.name}: {twice[0]!r} is stored twice")
            rest.update(dict.fromkeys(names, header))
            lossless.update(coded or {})
    _check_layers(layers, rest)
    for name in ("report.json", "provenance.json"):
        _json(path, f"{FOLDER}/{name}")
    if not _toml(path, f"{FOLDER}/recipe.toml"):
        raise FormatError(f"{FOLDER}/recipe.toml: is empty")
    return Container(path, config, layers, rest, lossless)


def read_layers(
    directory: Path | str, verify: bool = True
) -> Iterator[tuple[str, CompressedLayer]]:
    """Name and layer of everything compressed, in the order of the names, one at a time."""
    container = open_container(directory, verify)
    for name in sorted(container.layers):
        yield name, container.layer(name)


def read_layer(header: Header, name: str, spec: Spec, lend: Lend | None = None) -> CompressedLayer:
    """One layer of an opened shard. Raises FormatError naming the layer."""
    try:
        tensors = {field: read_tensor(header, f"{name}.{field}") for field in spec_layout(spec)}
        return layer_from_tensors(spec, tensors, lend)
    except FormatError as error:
        raise FormatError(f"{header.path.name}: {name}: {error}") from error


def _headers(path: Path) -> list[Header]:
    """Headers of all shards, checked against the index: every tensor exactly once."""
    index = _json(path, INDEX)
    weight_map = index.get("weight_map")
    if set(index) != {"metadata", "weight_map"} or not isinstance(weight_map, dict):
        raise FormatError(f"{INDEX}: needs exactly metadata and weight_map")
    if not weight_map or not all(isinstance(file, str) for file in weight_map.values()):
        raise FormatError(f"{INDEX}: weight_map must name a file for every tensor")
    headers = []
    for file in sorted(set(weight_map.values())):
        shard = inside(path, file)
        if "/" in file or not file.endswith(".safetensors") or not shard.is_file():
            raise FormatError(f"{INDEX}: {file[:80]!r} is not a shard of this directory")
        header = read_header(shard)
        mapped = {name for name, where in weight_map.items() if where == file}
        if mapped != set(header.entries):
            odd = sorted(mapped ^ set(header.entries))[0]
            raise FormatError(f"{file}: {odd!r} is in the index or in the file but not in both")
        headers.append(header)
    stray = {p.name for p in path.glob("*.safetensors")} - set(weight_map.values())
    if stray:
        raise FormatError(f"{sorted(stray)[0]}: a shard that {INDEX} does not mention")
    total = sum(entry.info.num_bytes for header in headers for entry in header.entries.values())
    if index["metadata"] != {"total_size": total}:
        raise FormatError(f"{INDEX}: total_size must be {total}")
    return headers


def _check_config(config: dict[str, Any]) -> None:
    ours = config.get("quantization_config")
    if not isinstance(ours, dict) or ours.get("quant_method") != QUANT_METHOD:
        raise FormatError(f"config.json: quantization_config.quant_method is not {QUANT_METHOD!r}")
    if set(ours) - {"activations"} != {"quant_method", "format_version"}:
        raise FormatError("config.json: quantization_config has unknown or missing keys")
    version = ours["format_version"]
    if type(version) is not int or version != FORMAT_VERSION:
        raise FormatError(f"config.json: format version {version!r}, not {FORMAT_VERSION}")
    if "activations" in ours:
        _check_activations(ours["activations"])


def _check_activations(text: Any) -> None:
    """FormatError unless it is a text that says activations in the one way that we write."""
    try:
        canonical = isinstance(text, str) and parse_activations(text).name == text
    except ConvexCalderaError as error:
        raise FormatError(f"config.json: activations: {error}") from error
    if not canonical:
        raise FormatError(f"config.json: activations {str(text)[:60]!r} are not in canonical form")


def _check_layers(layers: dict[str, tuple[Header, Spec]], rest: dict[str, Header]) -> None:
    if not layers:
        raise FormatError("no shard holds a compressed layer")
    for name, (header, _) in layers.items():
        if f"{name}.weight" in rest:
            raise FormatError(f"{header.path.name}: {name!r} is stored compressed and plain")


def _json(directory: Path, name: str) -> dict[str, Any]:
    value = parse_json(_bytes(directory, name), name)
    if not isinstance(value, dict):
        raise FormatError(f"{name}: must be a table")
    return value


def _toml(directory: Path, name: str) -> dict[str, Any]:
    try:
        return from_toml(_bytes(directory, name).decode())
    except (ConvexCalderaError, UnicodeDecodeError) as error:
        raise FormatError(f"{name}: {error}") from error


def _bytes(directory: Path, name: str) -> bytes:
    path = directory / name
    if not path.is_file():
        raise FormatError(f"{name}: missing")
    return path.read_bytes()
