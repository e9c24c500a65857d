"""The files of an output directory, by docs/format.md alone: manifest, hashes, shards, index.

Nothing here is shared with the program that writes these files, so that a mistake of its reader
cannot hide a mistake of its writer. Every deviation is a FormatError that names the file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from convex_caldera.certify.lossless import lossless_entries
from convex_caldera.certify.shard import Entry, Shard, read_shard
from convex_caldera.certify.specs import LayerSpec, layer_specs
from convex_caldera.certify.strict import parse, read_bytes, read_table, short, table
from convex_caldera.errors import FormatError

FOLDER = "convex_caldera"
MANIFEST = f"{FOLDER}/manifest.json"
CERTIFICATE = f"{FOLDER}/certificate.json"
INDEX = "model.safetensors.index.json"
VERSION = 1
MAX_MANIFEST_BYTES = 10_000_000
_HEX = frozenset("0123456789abcdef")
_BLOCK = "/(?:0|[1-9][0-9]*)"
_NUMBER = (
    f"(?:none|mxint[2-8](?:-legacy)?{_BLOCK}|s?int[1-8]{_BLOCK}|nf[2-8]{_BLOCK}"
    f"|e[1-5]m[0-6]{_BLOCK})"
)
_ACTIVATIONS = re.compile(
    f"(?P<linear>{_NUMBER})(?:,attention:(?P<attention>{_NUMBER}))?(?:,layout:legacy)?"
)


@dataclass(frozen=True, eq=False)
class Layer:
    """A compressed layer where it lies: its shard and what the shard's metadata says of it."""

    name: str
    shard: Shard
    spec: LayerSpec
    # All layers of the output by name, among them those that store a decoder for this one.
    others: Mapping[str, Layer] = field(default_factory=dict, repr=False)

    @property
    def stored_bytes(self) -> int:
        """Bytes of all its tensors."""
        entries = self.shard.entries
        return sum(entries[f"{self.name}.{field}"].num_bytes for field in self.spec.tensors)

    @property
    def payload_bytes(self) -> int:
        """The same without the padding of `packed`."""
        return self.stored_bytes - self.spec.padding


@dataclass(frozen=True, eq=False)
class Output:
    """An output directory whose structure was found in order; nothing is decoded yet.

    `lossless` are dtype and shape of those of the rest whose exponents are coded.
    """

    path: Path
    layers: Mapping[str, Layer]
    rest: Mapping[str, Shard]
    compressed: tuple[Shard, ...]
    lossless: Mapping[str, Entry] = field(default_factory=dict)

    @property
    def compressed_bytes(self) -> int:
        """Bytes of the files that hold compressed layers, headers included."""
        return sum(shard.size for shard in self.compressed)

    @property
    def layer_bytes(self) -> int:
        """Bytes of the tensors of all layers."""
        return sum(layer.stored_bytes for layer in self.layers.values())

    @cached_property
    def report(self) -> dict[str, Any]:
        return read_table(self.path / FOLDER / "report.json", f"{FOLDER}/report.json")

    @cached_property
    def provenance(self) -> dict[str, Any]:
        return read_table(self.path / FOLDER / "provenance.json", f"{FOLDER}/provenance.json")

    @cached_property
    def certificate(self) -> dict[str, Any] | None:
        """certificate.json, or None where the method makes no plan."""
        path = self.path / CERTIFICATE
        return read_table(path, CERTIFICATE) if path.is_file() else None


# --- manifest -------------------------------------------------------------------------------


def check_manifest(directory: Path) -> int:
    """Compare every file with the manifest; returns how many there are. One SHA-256 over all."""
    if not directory.is_dir():
        raise FormatError(f"{directory.name!a}: no such directory")
    files = read_manifest(directory)
    present = set(listed_files(directory))
    for name in sorted(present - set(files) - {MANIFEST}):
        raise FormatError(f"{short(name)}: not listed in {MANIFEST}")
    for name, entry in sorted(files.items()):
        path = directory / name
        if name not in present or not path.is_file():
            raise FormatError(f"{short(name)}: listed in {MANIFEST} but missing")
        if path.stat().st_size != entry["size"]:
            size = path.stat().st_size
            raise FormatError(f"{short(name)}: {size} bytes, not {entry['size']}: truncated")
        if sha256(path) != entry["sha256"]:
            raise FormatError(f"{short(name)}: SHA-256 differs from {MANIFEST}")
    return len(files)


def read_manifest(directory: Path) -> dict[str, dict[str, Any]]:
    """{"files": {name: {"sha256", "size"}}, "version": 1} in canonical form."""
    raw = read_bytes(directory / MANIFEST, MANIFEST, MAX_MANIFEST_BYTES)
    manifest = table(parse(raw, MANIFEST), ("files", "version"), MANIFEST)
    if type(manifest["version"]) is not int or manifest["version"] != VERSION:
        raise FormatError(f"{MANIFEST}: version {short(manifest['version'])}, not {VERSION}")
    files = manifest["files"]
    if not isinstance(files, dict) or MANIFEST in files:
        raise FormatError(f"{MANIFEST}: files must be a table of all files but itself")
    for name, entry in files.items():
        if not is_plain(name):
            raise FormatError(f"{MANIFEST}: unsafe file name {short(name)}")
        table(entry, ("sha256", "size"), f"{MANIFEST}: {short(name)}")
        digest, size = entry["sha256"], entry["size"]
        if not isinstance(digest, str) or len(digest) != 64 or set(digest) - _HEX:
            raise FormatError(f"{MANIFEST}: {short(name)} has a malformed hash")
        if type(size) is not int or size < 0:
            raise FormatError(f"{MANIFEST}: {short(name)} has a malformed size")
    canonical = json.dumps({"files": files, "version": VERSION}, indent=1, sort_keys=True) + "\n"
    if raw != canonical.encode():
        raise FormatError(f"{MANIFEST}: not in canonical form; it was altered")
    return files


def is_plain(name: str) -> bool:
    """A relative POSIX path that stays below its directory."""
    parts = name.split("/")
    safe = all(part not in ("", ".", "..") and not set(part) & set("\\:\0") for part in parts)
    return safe and name.isprintable()


def listed_files(directory: Path) -> list[str]:
    """Relative names of all files but those below hidden names at the top; links not followed."""
    found = []
    for folder, folders, files in os.walk(directory):
        here = Path(folder).relative_to(directory)
        if not here.parts:
            folders[:] = [name for name in folders if not name.startswith(".")]
            files = [name for name in files if not name.startswith(".")]
        links = [name for name in folders if (Path(folder) / name).is_symlink()]
        if links:
            raise FormatError(f"{short(links[0])}: a folder must not be a link")
        found += [(here / name).as_posix() for name in files]
    return found


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- structure ------------------------------------------------------------------------------


def read_output(directory: Path) -> Output:
    """Check config, index, shards and specs: every tensor in one file, every layer whole."""
    _check_config(read_table(directory / "config.json", "config.json"))
    shards = _indexed_shards(directory)
    layers: dict[str, Layer] = {}
    rest: dict[str, Shard] = {}
    lossless: dict[str, Entry] = {}
    compressed = []
    for shard in shards:
        specs = layer_specs(shard)
        if specs is None:
            coded = lossless_entries(shard)
            entries = shard.entries if coded is None else coded
            twice = sorted(set(entries) & set(rest))
            if twice:
                raise FormatError(f"{shard.name}: {short(twice[0])} is stored twice")
            rest.update(dict.fromkeys(entries, shard))
            lossless.update(coded or {})
            continue
        compressed.append(shard)
        for name, spec in specs.items():
            if name in layers:
                raise FormatError(f"{shard.name}: layer {short(name)} appears twice")
            layers[name] = Layer(name, shard, spec, layers)
    if not layers:
        raise FormatError("no shard holds a compressed layer")
    twins = [name for name in layers if f"{name}.weight" in rest]
    if twins:
        raise FormatError(f"layer {short(twins[0])} is stored compressed and plain")
    for name in ("report.json", "provenance.json"):
        read_table(directory / FOLDER / name, f"{FOLDER}/{name}")
    _check_recipe(directory)
    return Output(directory, layers, rest, tuple(compressed), lossless)


def _check_config(config: dict[str, Any]) -> None:
    ours = config.get("quantization_config")
    keys = ["quant_method", "format_version"]
    if isinstance(ours, dict) and "activations" in ours:
        keys.append("activations")
        _check_activations(ours["activations"])
    ours = table(ours, tuple(keys), "config.json: quantization_config")
    if ours["quant_method"] != "convex_caldera":
        raise FormatError("config.json: quant_method is not 'convex_caldera'")
    if type(ours["format_version"]) is not int or ours["format_version"] != VERSION:
        raise FormatError(f"config.json: format version {short(ours['format_version'])}")


def _check_activations(text: Any) -> None:
    """F1: the formats of activations, in the one spelling that writers use."""
    fields = _ACTIVATIONS.fullmatch(text) if isinstance(text, str) else None
    if fields is None or fields["attention"] == fields["linear"] or text == "none":
        raise FormatError(f"config.json: activations {short(text)} are not possible")
    if fields["linear"] == "none" and fields["attention"] is None:
        raise FormatError(f"config.json: activations {short(text)} round nothing")


def _indexed_shards(directory: Path) -> list[Shard]:
    index = table(read_table(directory / INDEX, INDEX), ("metadata", "weight_map"), INDEX)
    weight_map = index["weight_map"]
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{INDEX}: weight_map must name a file for every tensor")
    for file in weight_map.values():
        plain = isinstance(file, str) and is_plain(file) and "/" not in file
        if not plain or not file.endswith(".safetensors"):
            raise FormatError(f"{INDEX}: {short(file)} is not the name of a shard")
    files = sorted(set(weight_map.values()))
    shards = [read_shard(directory / file) for file in files]
    for shard in shards:
        mapped = {name for name, file in weight_map.items() if file == shard.name}
        if mapped != set(shard.entries):
            odd = sorted(mapped ^ set(shard.entries))[0]
            raise FormatError(f"{shard.name}: {short(odd)} is not in both index and file")
    stray = sorted({path.name for path in directory.glob("*.safetensors")} - set(files))
    if stray:
        raise FormatError(f"{short(stray[0])}: a shard that {INDEX} does not mention")
    total = sum(entry.num_bytes for shard in shards for entry in shard.entries.values())
    if index["metadata"] != {"total_size": total}:
        raise FormatError(f"{INDEX}: total_size must be {total}")
    return shards


def _check_recipe(directory: Path) -> None:
    name = f"{FOLDER}/recipe.toml"
    try:
        recipe = tomllib.loads(read_bytes(directory / name, name).decode())
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{name}: {ascii(str(error))[:120]}") from error
    if not recipe:
        raise FormatError(f"{name}: is empty")
