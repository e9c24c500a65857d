"""Kept tensors with their exponents entropy-coded, in files of their own.

A file `model-lossless-*` holds a U8 tensor `<name>.lossless` for every tensor `name` it stands
for; its metadata gives dtype and shape of each. Bits are those of the original, bit for bit.
docs/format.md, section 2.1, is normative.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from convex_caldera.coding.byte_planes import decode_planes, encode_planes
from convex_caldera.errors import FormatError
from convex_caldera.recipes.records import canonical_json
from convex_caldera.storage.shard import Header, TensorInfo, parse_json, read_raw

LOSSLESS_KEY = "convex_caldera_lossless"
SUFFIX = ".lossless"
CODED_DTYPES = ("F16", "BF16", "F32")
VERSION = 1
# A tensor is coded if that saves more than what naming it costs in the header.
LEAST_SAVING = 512


class Raw(Protocol):
    """Whatever has the bytes of kept tensors."""

    def raw(self, name: str) -> memoryview: ...


@dataclass(frozen=True)
class LosslessTensor:
    """A coded tensor: what it stands for, and what is stored."""

    info: TensorInfo
    num_bytes: int

    @property
    def stored(self) -> TensorInfo:
        return TensorInfo(self.info.name + SUFFIX, "U8", (self.num_bytes,))

    @property
    def saved_bytes(self) -> int:
        return self.info.num_bytes - self.num_bytes


def split_rest(
    source: Raw, rest: Iterable[TensorInfo]
) -> tuple[list[TensorInfo], list[LosslessTensor]]:
    """Tensors that stay as they are, and those that coding makes smaller.

    Cost: every tensor is coded once; one is in memory at a time.
    """
    plain, coded = [], []
    for info in rest:
        if info.dtype in CODED_DTYPES and info.num_bytes > LEAST_SAVING:
            tensor = LosslessTensor(info, encode_planes(source.raw(info.name), _width(info)).size)
            if tensor.saved_bytes > LEAST_SAVING + 2 * len(info.name):
                coded.append(tensor)
                continue
        plain.append(info)
    return plain, coded


def lossless_metadata(tensors: Iterable[LosslessTensor]) -> dict[str, str]:
    """`__metadata__` of a file that holds these."""
    table = {tensor.info.name: [tensor.info.dtype, list(tensor.info.shape)] for tensor in tensors}
    return {"format": "pt", LOSSLESS_KEY: canonical_json({"tensors": table, "version": VERSION})}


def encoded(source: Raw, stored: TensorInfo, originals: dict[str, TensorInfo]) -> memoryview:
    """The bytes of one stored tensor; `originals` by stored name."""
    info = originals[stored.name]
    return encode_planes(source.raw(info.name), _width(info)).data


def lossless_infos(header: Header) -> dict[str, TensorInfo] | None:
    """What the tensors of a file stand for, by original name; None if it is another kind of file.

    Raises:
        FormatError: metadata malformed, of another version, or not fitting the file's tensors.
    """
    text = header.metadata.get(LOSSLESS_KEY)
    if text is None:
        return None
    file = header.path.name
    record = parse_json(text, file)
    if not isinstance(record, dict) or set(record) != {"tensors", "version"}:
        raise FormatError(f"{file}: lossless metadata needs exactly tensors and version")
    if type(record["version"]) is not int or record["version"] != VERSION:
        raise FormatError(f"{file}: lossless version {record['version']!r}, not {VERSION}")
    if not isinstance(record["tensors"], dict) or not record["tensors"]:
        raise FormatError(f"{file}: tensors must be a table of what is coded")
    infos = {name: _info(name, value, file) for name, value in record["tensors"].items()}
    if {name + SUFFIX for name in infos} != set(header.entries):
        raise FormatError(f"{file}: its tensors are not those that its metadata names")
    for name in infos:
        stored = header.entries[name + SUFFIX].info
        if stored.dtype != "U8" or len(stored.shape) != 1:
            raise FormatError(f"{file}: {stored.name!r} must be a flat U8 tensor")
    return infos


def read_lossless(header: Header, info: TensorInfo) -> bytearray:
    """The original bytes of one tensor. Raises FormatError naming file and tensor."""
    import numpy as np

    stream = np.frombuffer(read_raw(header, info.name + SUFFIX), np.uint8)
    count = math.prod(info.shape)
    try:
        return bytearray(decode_planes(stream, count, _width(info)))
    except FormatError as error:
        raise FormatError(f"{header.path.name}: {info.name}: {error}") from error


def _info(name: str, value: object, file: str) -> TensorInfo:
    if not isinstance(value, list) or len(value) != 2 or value[0] not in CODED_DTYPES:
        raise FormatError(f"{file}: {name!r} needs [dtype, shape] with one of {CODED_DTYPES}")
    shape = value[1]
    if not isinstance(shape, list) or len(shape) > 8:
        raise FormatError(f"{file}: {name!r} has a malformed shape")
    if not all(type(size) is int and 0 <= size < 1 << 48 for size in shape):
        raise FormatError(f"{file}: {name!r} has a malformed shape")
    if math.prod(shape) >= 1 << 40:
        raise FormatError(f"{file}: {name!r} has too many elements")
    return TensorInfo(name, value[0], tuple(shape))


def _width(info: TensorInfo) -> int:
    return info.element_bytes
