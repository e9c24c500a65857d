"""Safetensors weights read one tensor at a time, from one file or from shards with an index."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convex_caldera.errors import FormatError, ModelError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_CHUNK = 1 << 22
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


class Checkpoint:
    """The tensors of a model directory, by the names they have on disk.

    Opening reads headers only; `tensor` reads one tensor. Files stay mapped until `close`.

    Raises:
        ModelError: there are no weights here.
        FormatError: a file is truncated or damaged, or shards and index disagree.
    """

    def __init__(self, path: Path):
        self.path = path
        self._open_files = ExitStack()
        self._file_of = self._indexed() if not (path / SINGLE).is_file() else None
        names = [SINGLE] if self._file_of is None else sorted(set(self._file_of.values()))
        self.files: tuple[Path, ...] = tuple(path / name for name in names)
        self._handles = {file.name: self._opened(file) for file in self.files}
        held = {name: file for file, handle in self._handles.items() for name in handle.keys()}
        if self._file_of is None:
            self._file_of = held
        self._compare_with_index(held)
        self.names: tuple[str, ...] = tuple(sorted(self._file_of))

    def __contains__(self, name: object) -> bool:
        return name in self._locations

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, from the headers."""
        return {name: tuple(self._slice(name).get_shape()) for name in self.names}

    def dtypes(self) -> dict[str, torch.dtype]:
        """The stored type of every tensor, from the headers."""
        return {name: self._dtype(name) for name in self.names}

    def tensor(self, name: str) -> Tensor:
        """One tensor as stored, in memory of its own.

        Raises:
            ModelError: there is no tensor of that name.
        """
        if name not in self._locations:
            raise ModelError(f"{self.path} has no tensor {name!r}")
        return self._handles[self._locations[name]].get_tensor(name).clone()

    @cached_property
    def file_hashes(self) -> dict[str, str]:
        """SHA-256 of config.json and of every weight file, by file name."""
        files = [*self.files, self.path / "config.json"]
        return {file.name: hash_file(file) for file in files if file.is_file()}

    @cached_property
    def fingerprint(self) -> str:
        """One SHA-256 over `file_hashes`: which model this is. Reads all files once."""
        return hashlib.sha256(json.dumps(self.file_hashes, sort_keys=True).encode()).hexdigest()

    @property
    def stored_bytes(self) -> int:
        """Bytes of the weight files, headers included."""
        return sum(file.stat().st_size for file in self.files)

    def close(self) -> None:
        """Unmap the files; no tensor can be read afterwards."""
        self._open_files.close()

    @property
    def _locations(self) -> Mapping[str, str]:
        return self._file_of or {}

    def _slice(self, name: str) -> Any:
        return self._handles[self._locations[name]].get_slice(name)

    def _dtype(self, name: str) -> torch.dtype:
        code = self._slice(name).get_dtype()
        if code not in _DTYPES:
            raise FormatError(f"{self.path}: tensor {name!r} has the unknown type {code}")
        return _DTYPES[code]

    def _opened(self, file: Path) -> Any:
        from safetensors import SafetensorError, safe_open

        try:
            return self._open_files.enter_context(safe_open(file, framework="pt"))
        except FileNotFoundError as error:
            raise FormatError(f"{file} is named by {INDEX} but does not exist") from error
        except (SafetensorError, OSError) as error:
            raise FormatError(
                f"{file} ({file.stat().st_size} bytes) is truncated or damaged: {error}; "
                "fetch it again"
            ) from error

    def _indexed(self) -> dict[str, str]:
        index = self.path / INDEX
        if not index.is_file():
            raise ModelError(f"{self.path} has neither {SINGLE} nor {INDEX}")
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise FormatError(f"{index} has no weight_map")
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise FormatError(f"{index} sends {name!r} to {file!r}, not a file of this folder")
        return weight_map

    def _compare_with_index(self, held: Mapping[str, str]) -> None:
        for name, file in self._locations.items():
            if held.get(name) != file:
                raise FormatError(
                    f"{self.path / INDEX} says that {name!r} is in {file}, but it is in "
                    f"{held.get(name, 'no shard')}"
                )
        extra = sorted(set(held) - set(self._locations))
        if extra:
            raise FormatError(f"{self.path}: tensor {extra[0]!r} is in a shard but not in {INDEX}")


def hash_file(file: Path) -> str:
    """SHA-256 of a file, read in chunks."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file; FormatError if it is not one."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise FormatError(f"{file} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise FormatError(f"{file} must hold a JSON object, not {type(content).__name__}")
    return content
