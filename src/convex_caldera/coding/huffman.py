"""Canonical Huffman codes of at most 12 bits: whole bits per symbol, one table look-up to read.

Lengths are the best under the limit (package-merge: Larmore & Hirschberg 1990). The canonical
code gives symbols, by rising length and then by value, consecutive numbers: only lengths are
stored. The symbols are cut into P parts of ceil(count / P), P a power of two that grows with
their number; each part starts at a whole byte, so that a decoder may read P parts at a time. A
stream is

    lowest symbol (1 byte), highest (1), lengths of lowest .. highest (4 bits each, 0: absent),
    bytes of each part (4 each), parts

A code's most significant bit comes first; bits fill bytes from the least significant one. A
single symbol needs no bits and no parts are written. Lengths must make a complete code and every
part end in its last byte, with zeros: truncated, altered or prolonged streams are found out.
Rates lie up to a few percent above the entropy; `rans` has none of that.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from convex_caldera.coding.symbols import (
    Bytes,
    check_symbol_bits,
    num_parts,
    packed_of,
    require,
    stream_of,
    symbol_range,
)

MAX_LENGTH = 12
Counts = NDArray[np.int64]
_require = partial(require, "Huffman")


@dataclass(frozen=True)
class Huffman:
    """Canonical, length-limited Huffman codes over symbols of `symbol_bits` bits.

    Raises:
        RecipeError: symbols have 1 to 8 bits.
    """

    symbol_bits: int

    kind: ClassVar[str] = "huffman"

    def __post_init__(self) -> None:
        check_symbol_bits(self.symbol_bits)

    def encode(self, packed: Tensor) -> Tensor:
        """A packed code stream, flat uint8, as a shorter one."""
        return stream_of(packed, self.symbol_bits, self._stream)

    def decode(self, coded: Tensor, num_bytes: int) -> Tensor:
        """The packed stream of `num_bytes` back. Raises FormatError unless it is one exactly."""
        return packed_of("Huffman", coded, num_bytes, self.symbol_bits, self._symbols)

    def _stream(self, symbols: Bytes) -> Bytes:
        from convex_caldera.coding import huffman_kernels

        lengths = code_lengths(np.bincount(symbols, minlength=1 << self.symbol_bits))
        if not lengths.any():
            return np.array([symbols[0], symbols[0]], np.uint8)
        size = part_size(symbols.size)
        sizes, body = huffman_kernels.encode(symbols, canonical(lengths), lengths, size)
        raw = np.frombuffer(sizes.astype("<u4").tobytes(), np.uint8)
        return np.concatenate([table_bytes(lengths), raw, body])

    def _symbols(self, stream: Bytes, count: int) -> Bytes:
        from convex_caldera.coding import huffman_kernels

        lengths, low, sizes, body = split_stream(stream, self.symbol_bits, count)
        if not lengths.any():
            return np.full(count, low, np.uint8)
        symbols, good = huffman_kernels.decode(
            count, part_size(count), look_up(lengths), MAX_LENGTH, sizes, body
        )
        _require(bool(good), "has a part that does not end with its last symbol")
        return symbols


def decode_plain(stream: Bytes, count: int, symbol_bits: int) -> Bytes:
    """The symbols of a stream bit by bit, in plain Python: the oracle of the kernel."""
    lengths, low, sizes, body = split_stream(stream, symbol_bits, count)
    if not lengths.any():
        return np.full(count, low, np.uint8)
    codes = canonical(lengths)
    symbol_of = {(int(lengths[s]), int(codes[s])): s for s in np.flatnonzero(lengths)}
    symbols: list[int] = []
    for part, piece in enumerate(np.split(body, np.cumsum(sizes)[:-1])):
        bits = iter(np.unpackbits(piece, bitorder="little").tolist())
        for _ in range(min(part_size(count), count - part * part_size(count))):
            length = code = 0
            while (length, code) not in symbol_of:
                bit = next(bits, None)
                _require(bit is not None, "ends before the last symbol")
                length, code = length + 1, code << 1 | int(bit or 0)
            symbols.append(symbol_of[length, code])
        rest = list(bits)
        _require(len(rest) < 8 and not any(rest), "does not end with the last symbol")
    return np.array(symbols, np.uint8)


def code_lengths(counts: Counts) -> Counts:
    """Lengths that make the shortest stream, none above 12; all 0 if one symbol occurs alone.

    Package-merge: twelve times, the symbols' weights are merged with pairs of the list before;
    a symbol's length is how often it is among the cheapest 2 (n - 1) entries of the last list.
    """
    present = np.flatnonzero(counts)
    lengths = np.zeros(counts.size, np.int64)
    if present.size < 2:
        return lengths
    coins = sorted((int(counts[s]), (int(s),)) for s in present)
    merged: list[tuple[int, tuple[int, ...]]] = []
    for _ in range(MAX_LENGTH):
        pairs = [
            (a[0] + b[0], a[1] + b[1]) for a, b in zip(merged[::2], merged[1::2], strict=False)
        ]
        merged = sorted([*coins, *pairs])
    for _, symbols in merged[: 2 * (present.size - 1)]:
        np.add.at(lengths, list(symbols), 1)
    return lengths


def canonical(lengths: Counts) -> NDArray[np.int64]:
    """Code numbers: by rising length, then by symbol, consecutive."""
    codes = np.zeros(lengths.size, np.int64)
    code = last = 0
    for s in np.lexsort((np.arange(lengths.size), lengths)):
        if lengths[s]:
            code <<= int(lengths[s]) - last
            codes[s], last = code, int(lengths[s])
            code += 1
    return codes


def look_up(lengths: Counts) -> NDArray[np.uint16]:
    """For each 12 bits to come, the first the least significant: 16 * symbol + length."""
    table = np.zeros(1 << MAX_LENGTH, np.uint16)
    codes = canonical(lengths)
    for s in np.flatnonzero(lengths):
        length = int(lengths[s])
        reverse = int(f"{int(codes[s]):0{length}b}"[::-1], 2)
        table[reverse :: 1 << length] = 16 * s + length
    return table


def part_size(count: int) -> int:
    """Symbols of each part but the last."""
    return -(-count // num_parts(count))


def table_bytes(lengths: Counts) -> Bytes:
    """Lowest and highest symbol, then the lengths between, two to a byte, the low half first."""
    present = np.flatnonzero(lengths)
    if not present.size:
        return np.zeros(0, np.uint8)
    low, high = int(present[0]), int(present[-1])
    between = lengths[low : high + 1]
    padded = np.append(between, np.zeros(between.size % 2, np.int64))
    return np.concatenate([[low, high], padded[::2] | padded[1::2] << 4]).astype(np.uint8)


def split_stream(
    stream: Bytes, symbol_bits: int, count: int
) -> tuple[Counts, int, NDArray[np.int64], Bytes]:
    """Lengths, lowest symbol, bytes of each part, parts; FormatError if they are impossible."""
    low, high = symbol_range("Huffman", stream, symbol_bits)
    lengths = np.zeros(1 << symbol_bits, np.int64)
    if low == high:
        _require(stream.size == 2, "has bytes after its only symbol")
        return lengths, low, np.zeros(0, np.int64), stream[2:]
    half = (high - low) // 2 + 1
    parts = -(-count // part_size(count))
    _require(stream.size >= 2 + half + 4 * parts, "is truncated")
    table = stream[2 : 2 + half].astype(np.int64)
    between = np.stack([table & 15, table >> 4], axis=1).ravel()
    lengths[low : high + 1] = between[: high - low + 1]
    sound = lengths[low] and lengths[high] and lengths.max() <= MAX_LENGTH
    sound = sound and not between[high - low + 1 :].any()
    kraft = (1 << (MAX_LENGTH - lengths[lengths > 0])).sum() if sound else 0
    _require(kraft == 1 << MAX_LENGTH, "has lengths that make no complete code")
    raw = stream[2 + half : 2 + half + 4 * parts].tobytes()
    sizes, body = np.frombuffer(raw, "<u4").astype(np.int64), stream[2 + half + 4 * parts :]
    _require(int(sizes.sum()) == body.size, "is truncated, or its parts do not fill it")
    return lengths, low, sizes, body
