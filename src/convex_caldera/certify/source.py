"""The original model: its tensors, and whether it is the one that was compressed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from convex_caldera.certify.lossless import original_bytes
from convex_caldera.certify.reader import INDEX, Output, is_plain, sha256
from convex_caldera.certify.shard import Shard, read_shard
from convex_caldera.certify.strict import read_table, short
from convex_caldera.certify.tuned import tuned_tensors
from convex_caldera.errors import CheckError, FormatError

SINGLE = "model.safetensors"
CHUNK = 1 << 24
COPIES = "copies"  # key of the report: tensor -> layer


@dataclass(frozen=True, eq=False)
class Source:
    """A model directory with safetensors weights: the file of every tensor."""

    path: Path
    shards: Mapping[str, Shard]
    files: tuple[str, ...]

    def weight(self, name: str) -> NDArray[np.float64]:
        """One tensor, float64. Raises FormatError if it is absent or not finite."""
        if name not in self.shards:
            raise FormatError(f"{self.path.name}: has no tensor {short(name)}")
        values = self.shards[name].array(name).astype(np.float64)
        if not np.isfinite(values).all():
            raise FormatError(f"{self.path.name}: {short(name)} is not finite")
        return values

    def fingerprint(self) -> str:
        """SHA-256 over the JSON of the SHA-256 of config.json and of every weight file."""
        names = [name for name in (*self.files, "config.json") if (self.path / name).is_file()]
        hashes = {name: sha256(self.path / name) for name in names}
        return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def read_source(path: Path) -> Source:
    """One file, or shards with an index. Raises FormatError where they are damaged."""
    if (path / SINGLE).is_file():
        files: tuple[str, ...] = (SINGLE,)
    else:
        weight_map = read_table(path / INDEX, INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise FormatError(f"{INDEX}: has no weight_map")
        for file in weight_map.values():
            if not isinstance(file, str) or "/" in file or not is_plain(file):
                raise FormatError(f"{INDEX}: {short(file)} is not a file of the model")
        files = tuple(sorted(set(weight_map.values())))
    shards: dict[str, Shard] = {}
    for file in files:
        shard = read_shard(path / file)
        shards.update(dict.fromkeys(shard.entries, shard))
    return Source(path, shards, files)


def check_source(output: Output, source: Source) -> str:
    """Files of the model as provenance.json lists them: a stale model is another model."""
    claimed = output.provenance.get("source_files")
    if not isinstance(claimed, dict) or not claimed:
        raise FormatError("provenance.json: names no source files")
    for name in source.files:
        if name not in claimed:
            raise CheckError(f"{short(name)} of the model is not among the source files")
    for name, digest in sorted(claimed.items()):
        path = source.path / name
        if not is_plain(name) or not path.is_file():
            raise CheckError(f"the model has no file {short(name)}, which was compressed")
        if sha256(path) != digest:
            raise CheckError(f"{short(name)} is not the file that was compressed")
    return f"{len(claimed)} files"


def check_rest(output: Output, source: Source) -> str:
    """Every tensor of the model is compressed, or stored as it was to the byte; none is new.

    Those that fine-tuning changed keep dtype and shape.
    """
    tuned = tuned_tensors(output)
    weights = {f"{name}.weight": layer.spec.shape for name, layer in output.layers.items()}
    copies = _check_copies(output, source)
    odd = set(source.shards) ^ (set(output.rest) | set(weights) | copies)
    if odd:
        raise CheckError(f"{short(sorted(odd)[0])} is in the model or the output but not in both")
    for name, shape in weights.items():
        if source.shards[name].entries[name].shape != shape:
            raise CheckError(f"{short(name)}: compressed as {shape}, unlike the model's")
    for name, shard in output.rest.items():
        other = source.shards[name]
        mine = output.lossless.get(name) or shard.entries[name]
        theirs = other.entries[name]
        if (mine.dtype, mine.shape) != (theirs.dtype, theirs.shape):
            raise CheckError(f"{short(name)}: dtype or shape differ from the model's")
        if name in tuned:
            continue
        if name in output.lossless:
            found = hashlib.sha256(original_bytes(shard, name, mine)).digest()
        else:
            found = _digest(shard, name)
        if found != _digest(other, name):
            raise CheckError(f"{short(name)}: its bytes differ from the model's")
    text = f"{len(output.rest) - len(tuned)} tensors" + (f", {len(tuned)} tuned" if tuned else "")
    return text + (f", {len(copies)} of a compressed matrix" if copies else "")


def _check_copies(output: Output, source: Source) -> set[str]:
    """Tensors that are not stored since the model has them twice: to the byte a layer's weight."""
    copies = output.report.get(COPIES, {})
    if not isinstance(copies, dict):
        raise FormatError(f"report: {COPIES} must be an object")
    for name, layer in copies.items():
        if not isinstance(layer, str) or layer not in output.layers or name in output.rest:
            raise CheckError(f"report: {COPIES}: {short(name)} is no copy of a compressed layer")
        if _differ(source, name, f"{layer}.weight"):
            raise CheckError(f"{short(name)} is not the matrix of {short(layer)} in the model")
    return set(copies)


def _differ(source: Source, one: str, other: str) -> bool:
    """Whether two tensors of the model differ in dtype, shape or bytes, or are not there."""
    if not {one, other} <= set(source.shards):
        return True
    first, second = (source.shards[name].entries[name] for name in (one, other))
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return True
    return _digest(source.shards[one], one) != _digest(source.shards[other], other)


def _digest(shard: Shard, name: str) -> bytes:
    entry = shard.entries[name]
    digest, left = hashlib.sha256(), entry.num_bytes
    with open(shard.path, "rb") as file:
        file.seek(entry.start)
        while left and (chunk := file.read(min(left, CHUNK))):
            digest.update(chunk)
            left -= len(chunk)
    return digest.digest()
