"""Saved second moments, read by their documented layout: calibration.json and block files.

    calibration.json          {"schema": 1, "provenance": {"model", "tokens", ...},
                               "blocks": {"0": {"file", "sha256", "inputs": {site: tokens}}}}
    block-00000.safetensors   <site>.packed: lower triangle of H, row by row, float32

Curvature of the model's own loss is kept by layer:

    curvature.json            {"schema": 1, "provenance": {"kind", "model", ...},
                               "files": {file: sha256}, "layers": {layer: file}}
    <file>                    kronecker: <layer>.input, <layer>.output: lower triangles of H and O
                              guided: <layer>.group0, .group1, ...: of H_k for groups of rows
                              diagonal: <layer>.diagonal: (n,), of a file of diagonal Hessians
                              all float64

Both may lie in one folder. Inside it, the folder `embeddings` holds second moments of what output
heads read, in the form of calibration.json, under the names of the heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convex_caldera.certify.reader import is_plain, sha256
from convex_caldera.certify.shard import Shard, read_shard
from convex_caldera.certify.strict import read_table, short, string, table
from convex_caldera.errors import FormatError

Floats = NDArray[np.float64]
INDEX = "calibration.json"
CURVATURE = "curvature.json"
HEADS = "embeddings"
BY_LAYER = ("kronecker", "guided", "diagonal")
ROW_UNIT = 16  # groups of rows begin at multiples of it
SCHEMA = 1
PROVENANCE = ("model", "tokens", "dtype", "store", "propagate", "recipe")


@dataclass(frozen=True, eq=False)
class Sides:
    """H (n, n) of the inputs and O (m, m) of the outputs, None for the identity; float64.

    With `groups`, rows r_k have a metric H_k of their own, and H is the mean of those by rows.
    """

    H: Floats
    O: Floats | None = None
    groups: tuple[tuple[slice, Floats], ...] = ()

    @cached_property
    def eigenvalues(self) -> tuple[Floats, Floats | None]:
        """Of H and of O, those below zero by rounding set to zero; one n^3 each."""
        h = np.linalg.eigvalsh(self.H).clip(min=0.0)
        return h, None if self.O is None else np.linalg.eigvalsh(self.O).clip(min=0.0)


@dataclass(frozen=True, eq=False)
class Statistics:
    """Saved curvature of a model. `kind` is "input" or one of BY_LAYER, as in certificates.

    `sides` takes (layer, input site, rows), `known` says whether there are any for (layer, input
    site), and `heads` are statistics of output heads, where there are any.
    """

    kind: str
    provenance: Mapping[str, Any]
    sides: Callable[[str, str, int], Sides]
    known: Callable[[str, str], bool] = lambda layer, site: True
    heads: Statistics | None = None


def read_statistics(directory: Path, kind: str = "input") -> Statistics:
    """Statistics of one kind in a folder, hashes checked. Raises FormatError where damaged."""
    name, reader = (CURVATURE, _read_curvature) if kind in BY_LAYER else (INDEX, _read_inputs)
    if not (directory / name).is_file():
        way = f"calibrate with --curvature {short(kind)}"
        if kind == "diagonal":
            way = "compress with --diag-hessians FILE --hessians DIR"
        raise FormatError(f"{directory.name!a}: holds no {name}; run {way}")
    found = reader(directory)
    if found.kind != kind:
        raise FormatError(f"{name}: losses are under {short(kind)} curvature, not {found.kind}")
    if kind != "diagonal" and (directory / HEADS / INDEX).is_file():
        return replace(found, heads=_read_inputs(directory / HEADS))
    return found


@dataclass(eq=False)
class _Inputs:
    """Second moments by input site; one matrix is kept, as layers come sorted by name."""

    shards: Mapping[str, Shard]
    last: tuple[str, Sides] | None = field(default=None)

    def __call__(self, layer: str, site: str, rows: int) -> Sides:
        if self.last is None or self.last[0] != site:
            if site not in self.shards:
                raise FormatError(f"the statistics have no input {short(site)}")
            packed = self.shards[site].array(f"{site}.packed").astype(np.float64)
            self.last = site, Sides(unpack_symmetric(packed, site))
        return self.last[1]


def _read_inputs(directory: Path) -> Statistics:
    index = table(read_table(directory / INDEX, INDEX), ("schema", "provenance", "blocks"), INDEX)
    if index["schema"] != SCHEMA:
        raise FormatError(f"{INDEX}: schema {short(index['schema'])}, not {SCHEMA}")
    provenance = table(index["provenance"], PROVENANCE, f"{INDEX}: provenance")
    blocks = index["blocks"]
    if not isinstance(blocks, dict):
        raise FormatError(f"{INDEX}: blocks must be an object")
    shards = {}
    for key, entry in blocks.items():
        where = f"{INDEX}: block {short(key)}"
        table(entry, ("file", "sha256", "inputs"), where)
        if not isinstance(entry["inputs"], dict):
            raise FormatError(f"{where}: inputs must be an object")
        shard = _hashed_shard(directory, entry["file"], entry["sha256"], where)
        shards.update(dict.fromkeys(entry["inputs"], shard))
    return Statistics("input", provenance, _Inputs(shards), lambda layer, site: site in shards)


def _read_curvature(directory: Path) -> Statistics:
    index = table(
        read_table(directory / CURVATURE, CURVATURE),
        ("schema", "provenance", "files", "layers"),
        CURVATURE,
    )
    if index["schema"] != SCHEMA:
        raise FormatError(f"{CURVATURE}: schema {short(index['schema'])}, not {SCHEMA}")
    provenance, files, layers = index["provenance"], index["files"], index["layers"]
    if not all(isinstance(part, dict) for part in (provenance, files, layers)):
        raise FormatError(f"{CURVATURE}: provenance, files and layers must be objects")
    string(provenance.get("model"), f"{CURVATURE}: provenance.model")
    kind = provenance.get("kind")
    if kind not in BY_LAYER:
        raise FormatError(f"{CURVATURE}: kind {short(kind)}")
    shards = {name: _hashed_shard(directory, name, files[name], CURVATURE) for name in files}

    def sides(layer: str, site: str, rows: int) -> Sides:
        file = layers.get(layer)
        if not isinstance(file, str) or file not in shards:
            raise FormatError(f"the curvature has no layer {short(layer)}")
        shard = shards[file]
        if kind == "kronecker":
            return Sides(_matrix(shard, f"{layer}.input"), _matrix(shard, f"{layer}.output"))
        if kind == "diagonal":
            return Sides(_diagonal(shard, f"{layer}.diagonal"))
        return _by_rows(shard, layer, rows)

    return Statistics(kind, provenance, sides, lambda layer, site: layer in layers)


def _by_rows(shard: Shard, layer: str, rows: int) -> Sides:
    """Groups of equal height, a multiple of 16; the last one may be shorter."""
    count = 0
    while f"{layer}.group{count}" in shard.entries:
        count += 1
    units = -(-rows // ROW_UNIT)
    height = ROW_UNIT * -(-units // max(count, 1))
    starts = range(0, rows, height)
    if len(starts) != count:
        raise FormatError(f"the curvature of {short(layer)} has {count} groups for {rows} rows")
    groups = tuple(
        (slice(start, min(start + height, rows)), _matrix(shard, f"{layer}.group{k}"))
        for k, start in enumerate(starts)
    )
    total = sum((rows_k.stop - rows_k.start) * H for rows_k, H in groups)
    return Sides(np.asarray(total) / rows, None, groups)


def _matrix(shard: Shard, name: str) -> Floats:
    return unpack_symmetric(shard.array(name).astype(np.float64), name)


def _diagonal(shard: Shard, name: str) -> Floats:
    values = shard.array(name).astype(np.float64)
    if values.ndim != 1 or not np.isfinite(values).all() or (values < 0).any():
        raise FormatError(f"{short(name)}: not finite entries >= 0 in a row, {values.shape}")
    return np.diag(values)


def _hashed_shard(directory: Path, file: Any, digest: Any, where: str) -> Shard:
    name = string(file, where)
    if not is_plain(name) or "/" in name or not (directory / name).is_file():
        raise FormatError(f"{where}: {short(name)} is not a file of this folder")
    if sha256(directory / name) != digest:
        raise FormatError(f"{where}: {short(name)} is not what was written (SHA-256 differs)")
    return read_shard(directory / name)


def unpack_symmetric(packed: Floats, name: str) -> Floats:
    """(n, n) from its lower triangle, row by row. Raises FormatError if it is not finite."""
    n = int((np.sqrt(8.0 * len(packed) + 1) - 1) / 2)
    if packed.ndim != 1 or n * (n + 1) // 2 != len(packed) or not np.isfinite(packed).all():
        raise FormatError(f"{short(name)}: not a finite packed triangle, {packed.shape}")
    matrix = np.zeros((n, n))
    matrix[np.tril_indices(n)] = packed
    return matrix + np.tril(matrix, -1).T
