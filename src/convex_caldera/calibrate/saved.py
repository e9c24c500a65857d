"""Statistics on disk: one safetensors file per block, and a JSON that says whose they are.

    calibration.json          schema, provenance, per block its file, hash and token counts
    block-00000.safetensors   <input site>.packed, <input site>.mean_abs

Files are written beside their place and renamed, the JSON last, so that a run killed at any
moment leaves whole blocks only.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save

from convex_caldera.calibrate.statistics import InputStatistics
from convex_caldera.errors import FormatError, InterruptedRunError, ResumeError
from convex_caldera.models.checkpoint import hash_file, read_json

INDEX = "calibration.json"
SCHEMA = 1


@dataclass(frozen=True)
class Provenance:
    """What statistics depend on; they are reused only if all of it is the same.

    Attributes:
        model: fingerprint of the checkpoint (`Checkpoint.fingerprint`).
        tokens: fingerprint of the token ids (`text.fingerprint`).
        dtype: of the computation, as "float32".
        store: type in which hidden states waited.
        propagate: "original" or "compressed".
        recipe: what the propagated blocks were compressed with; empty for "original".
    """

    model: str
    tokens: str
    dtype: str = "float32"
    store: str = "float32"
    propagate: str = "original"
    recipe: str = ""


class SavedStatistics(Mapping[int, dict[str, InputStatistics]]):
    """Statistics in a directory, by block; each block is read and checked when asked for."""

    def __init__(self, directory: Path, provenance: Provenance, blocks: dict[int, dict[str, Any]]):
        self.directory = directory
        self.provenance = provenance
        self._blocks = blocks

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._blocks))

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, index: int) -> dict[str, InputStatistics]:
        """Statistics of one block by input site; FormatError if its file was changed."""
        entry = self._blocks[index]
        file = self.directory / entry["file"]
        if not file.is_file():
            raise FormatError(f"{file} is missing; calibrate again")
        if hash_file(file) != entry["sha256"]:
            raise FormatError(f"{file} is not what was written (hash differs); calibrate again")
        try:
            tensors = load(file.read_bytes())
        except SafetensorError as error:
            raise FormatError(f"{file} is not readable: {error}") from error
        return {
            name: InputStatistics.restore(name, _fields(tensors, name), tokens)
            for name, tokens in entry["inputs"].items()
        }


def save_statistics(
    directory: Path, index: int, inputs: Mapping[str, InputStatistics], provenance: Provenance
) -> None:
    """Write the statistics of one block, beside those of other blocks of the same provenance.

    Raises:
        ResumeError: the directory holds statistics of another model, text or setting.
        InterruptedRunError: the disk is full; what was written before stays usable.
    """
    directory.mkdir(parents=True, exist_ok=True)
    known = dict(load_statistics(directory, provenance)._blocks) if _exists(directory) else {}
    tensors = {
        f"{name}.{field}": tensor.contiguous()
        for name, statistics in inputs.items()
        for field, tensor in statistics.tensors().items()
    }
    file = directory / f"block-{index:05d}.safetensors"
    write_atomic(file, save(tensors))
    known[index] = {
        "file": file.name,
        "sha256": hash_file(file),
        "inputs": {name: statistics.num_tokens for name, statistics in inputs.items()},
    }
    content = {
        "schema": SCHEMA,
        "provenance": asdict(provenance),
        "blocks": {str(i): known[i] for i in sorted(known)},
    }
    write_atomic(directory / INDEX, (json.dumps(content, indent=1) + "\n").encode())


def load_statistics(directory: Path, provenance: Provenance) -> SavedStatistics:
    """Statistics saved before, if they are of this model, text and setting.

    Raises:
        ResumeError: they are of another; the message says what differs.
        FormatError: the directory is not what `save_statistics` writes.
    """
    content = read_json(directory / INDEX)
    if set(content) != {"schema", "provenance", "blocks"} or content["schema"] != SCHEMA:
        raise FormatError(f"{directory / INDEX} is not calibration schema {SCHEMA}")
    written, expected = content["provenance"], asdict(provenance)
    if not isinstance(written, dict) or set(written) != set(expected):
        raise FormatError(f"{directory / INDEX} has no complete provenance")
    for key, value in expected.items():
        if written[key] != value:
            raise ResumeError(
                f"{directory} holds statistics for another {key} ({written[key]!r}, now "
                f"{value!r}); use another directory or remove this one"
            )
    if not isinstance(content["blocks"], dict):
        raise FormatError(f"{directory / INDEX} has no blocks")
    blocks = {_index(key): _entry(entry, directory) for key, entry in content["blocks"].items()}
    return SavedStatistics(directory, provenance, blocks)


def _exists(directory: Path) -> bool:
    return (directory / INDEX).is_file()


def _fields(tensors: Mapping[str, Any], name: str) -> dict[str, Any]:
    prefix = f"{name}."
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}


def _index(key: str) -> int:
    if not key.isascii() or not key.isdigit():
        raise FormatError(f"{INDEX}: {key!r} is not the number of a block")
    return int(key)


def _entry(entry: Any, directory: Path) -> dict[str, Any]:
    fits = (
        isinstance(entry, dict)
        and set(entry) == {"file", "sha256", "inputs"}
        and isinstance(entry["file"], str)
        and Path(entry["file"]).name == entry["file"]
        and isinstance(entry["sha256"], str)
        and isinstance(entry["inputs"], dict)
        and all(type(tokens) is int for tokens in entry["inputs"].values())
    )
    if not fits:
        raise FormatError(f"{directory / INDEX} has a damaged record of a block: {entry!r:.80}")
    return entry


def write_atomic(file: Path, content: bytes) -> None:
    """Write beside, flush to disk, rename: a reader sees the old file or the new one."""
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with partial.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)
    except OSError as error:
        partial.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InterruptedRunError(
                f"disk full while writing {file} ({len(content)} bytes); make room and run again"
            ) from error
        raise
