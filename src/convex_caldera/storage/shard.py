"""safetensors files, byte for byte under our control.

A file is: header length (8 bytes, little-endian), a JSON header padded with spaces to a multiple
of eight, then the tensors without gaps. The layout depends on names, dtypes and shapes only, so
the size of a file is known before its data (`shard_bytes`), and the same tensors always give the
same bytes. Reading checks everything that the format demands and trusts nothing.

Source: the safetensors format (github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convex_caldera.errors import FormatError
from convex_caldera.storage.files import Bytes, write_atomically

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
ALIGNMENT = 8
MAX_DIMENSION = 1 << 48
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library


@dataclass(frozen=True)
class TensorInfo:
    """Name, dtype ("F16") and shape of one stored tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def element_bytes(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.element_bytes


@dataclass(frozen=True)
class Entry:
    """A tensor of an existing file and where its bytes are, from the start of the file."""

    info: TensorInfo
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """What a file holds: metadata (text to text) and its tensors by name."""

    path: Path
    metadata: dict[str, str]
    entries: dict[str, Entry]


def describe(name: str, tensor: Tensor) -> TensorInfo:
    """The TensorInfo of a tensor in memory. Raises FormatError for dtypes safetensors lacks."""
    if tensor.dtype not in NAMES:
        raise FormatError(f"{name}: dtype {tensor.dtype} cannot be stored")
    return TensorInfo(name, NAMES[tensor.dtype], tuple(tensor.shape))


# --- writing --------------------------------------------------------------------------------


def header_bytes(infos: Iterable[TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """The first part of the file, up to the data; tensors lie in the order given."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for info in infos:
        if info.name in header:
            raise FormatError(f"two tensors are named {info.name!r}")
        end = offset + info.num_bytes
        header[info.name] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def shard_bytes(infos: Iterable[TensorInfo], metadata: Mapping[str, str]) -> int:
    """Exact size of the file that `write_shard` would make."""
    infos = list(infos)
    return len(header_bytes(infos, metadata)) + sum(info.num_bytes for info in infos)


def write_shard(
    path: Path,
    infos: list[TensorInfo],
    metadata: Mapping[str, str],
    data: Callable[[TensorInfo], Bytes],
) -> str:
    """Write one file atomically, asking `data` for each tensor's bytes in turn.

    Returns the SHA-256 of the file. Raises InterruptedRunError if the disk is full.
    """

    def chunks() -> Iterator[Bytes]:
        yield header_bytes(infos, metadata)
        for info in infos:
            raw = data(info)
            if len(raw) != info.num_bytes:
                raise FormatError(f"{info.name}: {len(raw)} bytes instead of {info.num_bytes}")
            yield raw

    return write_atomically(path, chunks())


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The raw little-endian bytes of a tensor, row-major."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data


# --- reading --------------------------------------------------------------------------------


def read_header(path: Path) -> Header:
    """Parse and check the header of a safetensors file.

    Raises:
        FormatError: truncated, not JSON, duplicate names, unknown dtypes, sizes that do not
            match shapes, or data that overlaps, leaves holes or does not end with the file.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise FormatError(f"{path.name}: truncated or not a safetensors file ({size} bytes)")
        text = file.read(length)
    header = parse_json(text, path.name)
    if not isinstance(header, dict) or text[:1] != b"{":
        raise FormatError(f"{path.name}: the header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FormatError(f"{path.name}: __metadata__ must map text to text")
    start = 8 + length
    entries = {name: _entry(name, raw, start, path.name) for name, raw in header.items()}
    _check_coverage(entries, start, size, path.name)
    return Header(path, metadata, entries)


def parse_json(text: bytes | str, name: str) -> Any:
    """JSON without duplicate keys, NaN or absurd depth. Raises FormatError naming the file."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            raise FormatError(f"{name}: a JSON key appears twice")
        return table

    def refuse(constant: str) -> None:
        raise FormatError(f"{name}: {constant} is not a JSON number")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{name}: not valid JSON ({error})") from error


def _entry(name: str, raw: Any, start: int, file: str) -> Entry:
    if not isinstance(raw, dict) or set(raw) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{file}: {name!r} needs exactly dtype, shape and data_offsets")
    if not isinstance(raw["dtype"], str) or raw["dtype"] not in DTYPES:
        raise FormatError(f"{file}: {name!r} has unknown dtype {raw['dtype']!r}")
    shape, offsets = raw["shape"], raw["data_offsets"]
    if not (_naturals(shape) and _naturals(offsets) and len(offsets) == 2):
        raise FormatError(f"{file}: {name!r} has a malformed shape or offsets")
    info = TensorInfo(name, raw["dtype"], tuple(shape))
    if offsets[1] - offsets[0] != info.num_bytes:
        got = offsets[1] - offsets[0]
        raise FormatError(
            f"{file}: {name!r} {tuple(shape)} takes {info.num_bytes} bytes, not {got}"
        )
    return Entry(info, start + offsets[0], start + offsets[1])


def _naturals(value: Any) -> bool:
    if not isinstance(value, list) or len(value) > 8:
        return False
    return all(type(item) is int and 0 <= item < MAX_DIMENSION for item in value)


def _check_coverage(entries: Mapping[str, Entry], start: int, size: int, file: str) -> None:
    position = start
    for entry in sorted(entries.values(), key=lambda e: (e.start, e.stop)):
        if entry.start != position:
            raise FormatError(f"{file}: {entry.info.name!r} overlaps or leaves a hole")
        position = entry.stop
    if position != size:
        raise FormatError(f"{file}: data ends at {position} but the file has {size} bytes")


def read_raw(header: Header, name: str) -> bytearray:
    """The bytes of one tensor, in memory of their own."""
    entry = header.entries[name]
    raw = bytearray(entry.stop - entry.start)
    with open(header.path, "rb") as file:
        file.seek(entry.start)
        if file.readinto(raw) != len(raw):
            raise FormatError(f"{header.path.name}: truncated at {name!r}")
    return raw


def read_tensor(header: Header, name: str) -> Tensor:
    """One tensor on the CPU."""
    info = header.entries[name].info
    if info.num_bytes == 0:
        return torch.empty(info.shape, dtype=DTYPES[info.dtype])
    return bytes_as_tensor(read_raw(header, name), info)


def bytes_as_tensor(raw: bytearray, info: TensorInfo) -> Tensor:
    """Bytes as the tensor that they are, sharing memory."""
    if not raw:
        return torch.empty(info.shape, dtype=DTYPES[info.dtype])
    return torch.frombuffer(raw, dtype=DTYPES[info.dtype]).reshape(info.shape)
