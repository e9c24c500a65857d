"""Tensors that were kept with their exponents entropy-coded, back to their bytes.

A file whose metadata has "convex_caldera_lossless" = {"tensors": {name: [dtype, shape]},
"version": 1} holds `<name>.lossless`, U8, for each. A number of k bytes is rotated left by one
bit; bytes of equal place form planes, upper first, each coded by rANS (symbols of 8 bits) or kept.
docs/format.md, section 2.1, is normative.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from convex_caldera.certify.decode_entropy import decode_rans
from convex_caldera.certify.shard import Entry, Shard
from convex_caldera.certify.strict import listing, natural, parse, short, table
from convex_caldera.errors import FormatError

KEY = "convex_caldera_lossless"
SUFFIX = ".lossless"
VERSION = 1
WIDTHS = {"F16": 2, "BF16": 2, "F32": 4}
MOST_ELEMENTS = 1 << 40
MOST_A_BYTE = 1 << 20


def lossless_entries(shard: Shard) -> Mapping[str, Entry] | None:
    """Dtype and shape of what a file stands for, with byte ranges as if it were plain from 0."""
    text = shard.metadata.get(KEY)
    if text is None:
        return None
    record = table(parse(text.encode(), shard.name), ("tensors", "version"), shard.name)
    if type(record["version"]) is not int or record["version"] != VERSION:
        raise FormatError(f"{shard.name}: lossless version {short(record['version'])}")
    if not isinstance(record["tensors"], dict) or not record["tensors"]:
        raise FormatError(f"{shard.name}: tensors must be a table")
    found = {name: _entry(shard, name, value) for name, value in record["tensors"].items()}
    if {name + SUFFIX for name in found} != set(shard.entries):
        raise FormatError(f"{shard.name}: its tensors are not those that its metadata names")
    return found


def original_bytes(shard: Shard, name: str, entry: Entry) -> bytes:
    """The bytes of one tensor as they were. Raises FormatError for damaged streams."""
    stream = shard.array(name + SUFFIX)
    width, count = WIDTHS[entry.dtype], math.prod(entry.shape)
    if count > MOST_A_BYTE * len(stream):
        raise FormatError(f"{short(name)}: {count} numbers cannot be in {len(stream)} bytes")
    planes = np.zeros((count, width), np.uint8)
    at = 9 * width
    for k in range(width):
        header = stream[9 * k : 9 * (k + 1)].tobytes()
        size = int.from_bytes(header[1:], "little")
        if len(header) != 9 or header[0] > 1 or size > len(stream) - at:
            raise FormatError(f"{short(name)}: plane {k} is truncated or altered")
        plane = stream[at : at + size]
        at += size
        if header[0]:
            plane = decode_rans(plane, count, 8) if count else plane
        if len(plane) != count:
            raise FormatError(f"{short(name)}: plane {k} has {len(plane)} bytes for {count}")
        planes[:, width - 1 - k] = plane
    if at != len(stream):
        raise FormatError(f"{short(name)}: bytes after the last plane")
    rotated = planes.reshape(-1).view(f"<u{width}")
    return ((rotated >> 1) | (rotated << (8 * width - 1))).astype(f"<u{width}").tobytes()


def _entry(shard: Shard, name: str, value: object) -> Entry:
    where = f"{shard.name}: {short(name)}"
    pair = listing(value, where)
    if len(pair) != 2 or not isinstance(pair[0], str) or pair[0] not in WIDTHS:
        raise FormatError(f"{where} needs [dtype, shape]")
    shape = tuple(natural(size, where, (1 << 48) - 1) for size in listing(pair[1], where))
    if len(shape) > 8 or math.prod(shape) >= MOST_ELEMENTS:
        raise FormatError(f"{where} has a malformed shape")
    stored = shard.entries.get(name + SUFFIX)
    if stored is None or stored.dtype != "U8" or len(stored.shape) != 1:
        raise FormatError(f"{where}: {SUFFIX} must be a flat U8 tensor of this file")
    return Entry(pair[0], shape, 0, math.prod(shape) * WIDTHS[pair[0]])
