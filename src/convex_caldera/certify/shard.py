"""safetensors files read without trust: header, ranges, and single tensors as numpy arrays.

A file is the header's length (8 bytes, little-endian), a JSON header, and the tensors' bytes,
row-major and little-endian, without gaps or overlaps up to the end of the file.

Source: the safetensors format (github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convex_caldera.certify.strict import parse, short, table
from convex_caldera.errors import FormatError

ELEMENT_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}
_NUMPY = {"U8": "u1", "U16": "<u2", "U32": "<u4", "F16": "<f2", "F32": "<f4", "F64": "<f8"}
MAX_HEADER_BYTES = 100_000_000
MAX_SIZE = 1 << 48


@dataclass(frozen=True)
class Entry:
    """Dtype ("F16"), shape and byte range, counted from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, eq=False)
class Shard:
    """A safetensors file whose header is in order."""

    path: Path
    size: int
    metadata: Mapping[str, str]
    entries: Mapping[str, Entry]

    @property
    def name(self) -> str:
        return self.path.name

    def array(self, name: str) -> NDArray[Any]:
        """One tensor; bfloat16 comes widened to float32. Raises FormatError if truncated."""
        if name not in self.entries:
            raise FormatError(f"{self.name}: has no tensor {short(name)}")
        entry = self.entries[name]
        with open(self.path, "rb") as file:
            file.seek(entry.start)
            raw = file.read(entry.num_bytes)
        if len(raw) != entry.num_bytes:
            raise FormatError(f"{self.name}: truncated at {short(name)}")
        return from_bytes(raw, entry.dtype, entry.shape)


def from_bytes(raw: bytes, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """The array that these bytes are. Raises FormatError for dtypes that hold no weights."""
    if dtype == "BF16":
        words = np.frombuffer(raw, "<u2").astype(np.uint32) << np.uint32(16)
        return words.view(np.float32).reshape(shape)
    if dtype not in _NUMPY:
        raise FormatError(f"tensors of type {dtype} are not read by the checker")
    return np.frombuffer(raw, _NUMPY[dtype]).reshape(shape)


def read_shard(path: Path) -> Shard:
    """Header of a file, checked to the last byte; FormatError otherwise."""
    if not path.is_file():
        raise FormatError(f"{short(path.name)}: missing")
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise FormatError(f"{path.name}: truncated or no safetensors file ({size} bytes)")
        text = file.read(length)
    header = parse(text, path.name)
    if not isinstance(header, dict) or text[:1] != b"{":
        raise FormatError(f"{path.name}: the header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FormatError(f"{path.name}: __metadata__ must map text to text")
    start = 8 + length
    entries = {name: _entry(name, raw, start, path.name) for name, raw in header.items()}
    position = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != position:
            raise FormatError(f"{path.name}: {short(name)} overlaps or leaves a hole")
        position = entry.stop
    if position != size:
        raise FormatError(f"{path.name}: data ends at {position}, the file at {size}")
    return Shard(path, size, metadata, entries)


def _entry(name: str, raw: Any, start: int, file: str) -> Entry:
    where = f"{file}: {short(name)}"
    table(raw, ("dtype", "shape", "data_offsets"), where)
    dtype, shape, offsets = raw["dtype"], raw["shape"], raw["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ELEMENT_BYTES:
        raise FormatError(f"{where} has the unknown dtype {short(dtype)}")
    if not (_naturals(shape) and _naturals(offsets) and len(offsets) == 2):
        raise FormatError(f"{where} has a malformed shape or offsets")
    want = math.prod(shape) * ELEMENT_BYTES[dtype]
    if offsets[1] - offsets[0] != want:
        raise FormatError(f"{where} takes {want} bytes, not {offsets[1] - offsets[0]}")
    return Entry(dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _naturals(value: Any) -> bool:
    if not isinstance(value, list) or len(value) > 8:
        return False
    return all(type(item) is int and 0 <= item < MAX_SIZE for item in value)
