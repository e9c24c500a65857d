"""Saved second moments, read by their documented layout: calibration.json and block files.

    calibration.json          {"schema": 1, "provenance": {"model", "tokens", ...},
                               "blocks": {"0": {"file", "sha256", "inputs": {site: tokens}}}}
    block-00000.safetensors   <site>.packed: lower triangle of H, row by row, float32

A folder is told by its index file, `READERS`; one with both sides of a Kronecker curvature is
another entry of that table, and gives O beside H.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
SCHEMA = 1
PROVENANCE = ("model", "tokens", "dtype", "store", "propagate", "recipe")


@dataclass(frozen=True, eq=False)
class Sides:
    """H (n, n) of the inputs and O (m, m) of the outputs, None for the identity; float64."""

    H: Floats
    O: Floats | None = None


@dataclass(frozen=True, eq=False)
class Statistics:
    """Saved curvature of a model. `kind` is "input" or "kronecker", as certificates name it."""

    kind: str
    provenance: Mapping[str, Any]
    sides: Callable[[str, str], Sides]  # (layer, input site) -> both sides


def read_statistics(directory: Path) -> Statistics:
    """Statistics of a folder, hashes checked. Raises FormatError where it is damaged."""
    for name, reader in READERS.items():
        if (directory / name).is_file():
            return reader(directory)
    raise FormatError(f"{directory.name!a}: holds none of {', '.join(READERS)}")


@dataclass(eq=False)
class _Inputs:
    """Second moments by input site; one matrix is kept, as layers come sorted by name."""

    shards: Mapping[str, Shard]
    last: tuple[str, Sides] | None = field(default=None)

    def __call__(self, layer: str, site: str) -> Sides:
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
        file = string(entry["file"], where)
        if not is_plain(file) or "/" in file or not (directory / file).is_file():
            raise FormatError(f"{where}: {short(file)} is not a file of this folder")
        if sha256(directory / file) != entry["sha256"]:
            raise FormatError(f"{where}: {file} is not what was written (SHA-256 differs)")
        if not isinstance(entry["inputs"], dict):
            raise FormatError(f"{where}: inputs must be an object")
        shards.update(dict.fromkeys(entry["inputs"], read_shard(directory / file)))
    return Statistics("input", provenance, _Inputs(shards))


def unpack_symmetric(packed: Floats, name: str) -> Floats:
    """(n, n) from its lower triangle, row by row. Raises FormatError if it is not finite."""
    n = int((np.sqrt(8.0 * len(packed) + 1) - 1) / 2)
    if packed.ndim != 1 or n * (n + 1) // 2 != len(packed) or not np.isfinite(packed).all():
        raise FormatError(f"{short(name)}: not a finite packed triangle, {packed.shape}")
    matrix = np.zeros((n, n))
    matrix[np.tril_indices(n)] = packed
    return matrix + np.tril(matrix, -1).T


READERS: dict[str, Callable[[Path], Statistics]] = {INDEX: _read_inputs}
