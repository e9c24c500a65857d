"""rANS: symbols at the cost of their entropy, by one integer per lane (Duda, arXiv 1311.2540).

A lane's state x, 2^16 <= x < 2^32, holds what is still to be read. With frequencies f_s that sum
to M = 2^14 and F_s the sum of those before s, one symbol is taken from it by

    slot = x mod M,   s: F_s <= slot < F_s + f_s,   x <- f_s (x div M) + slot - F_s,

and if then x < 2^16, 16 bits are read: x <- 2^16 x + word. Encoding runs the same backwards.
Symbol i belongs to lane i mod L, L a power of two that grows with the number of symbols, and all
lanes read from one stream of words in the order of the symbols (Giesen, arXiv 1402.3392); so a
decoder may take L symbols at a time. A stream is

    lowest symbol (1 byte), highest (1), f_s of lowest .. highest (LEB128),
    states (4 bytes each), words (2 bytes each)

and nothing if there are no symbols. Every lane must end at 2^16 with all words read: truncated,
altered or prolonged streams are found out.
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

PRECISION = 14
TOTAL = 1 << PRECISION
LOWEST_STATE = 1 << 16
Counts = NDArray[np.int64]
_require = partial(require, "rANS")


@dataclass(frozen=True)
class Rans:
    """Range asymmetric numeral systems over symbols of `symbol_bits` bits (see `symbols`).

    Raises:
        RecipeError: symbols have 1 to 8 bits.
    """

    symbol_bits: int

    kind: ClassVar[str] = "rans"

    def __post_init__(self) -> None:
        check_symbol_bits(self.symbol_bits)

    def encode(self, packed: Tensor) -> Tensor:
        """A packed code stream, flat uint8, as a shorter one. About 10 ns a symbol."""
        return stream_of(packed, self.symbol_bits, self._stream)

    def decode(self, coded: Tensor, num_bytes: int) -> Tensor:
        """The packed stream of `num_bytes` back. Raises FormatError unless it is one exactly."""
        return packed_of("rANS", coded, num_bytes, self.symbol_bits, self._symbols)

    def _stream(self, symbols: Bytes) -> Bytes:
        from convex_caldera.coding import rans_kernels

        frequencies = normalized(np.bincount(symbols, minlength=1 << self.symbol_bits))
        lanes = num_parts(symbols.size)
        states, words = rans_kernels.encode(symbols, frequencies, PRECISION, lanes)
        parts = [table_bytes(frequencies), _raw(states, "<u4"), _raw(words, "<u2")]
        return np.concatenate(parts)

    def _symbols(self, stream: Bytes, count: int) -> Bytes:
        from convex_caldera.coding import rans_kernels

        frequencies, states, words = split_stream(stream, self.symbol_bits, num_parts(count))
        symbols, used, ends = rans_kernels.decode(count, frequencies, PRECISION, states, words)
        _require(used == words.size, "has words that do not end with the last symbol")
        _require(bool((ends == LOWEST_STATE).all()), "has a lane that does not end where it began")
        return symbols


def decode_plain(stream: Bytes, count: int, symbol_bits: int) -> Bytes:
    """The symbols of a stream in a dozen lines of plain Python: the oracle of the kernel."""
    frequencies, states, words = split_stream(stream, symbol_bits, num_parts(count))
    starts = np.concatenate([[0], np.cumsum(frequencies)])
    owner = np.repeat(np.arange(frequencies.size), frequencies)
    lanes, queue = [int(x) for x in states], [int(w) for w in words]
    symbols = np.empty(count, np.uint8)
    for i in range(count):
        x = lanes[i % len(lanes)]
        slot = x % TOTAL
        symbols[i] = s = int(owner[slot])
        x = int(frequencies[s]) * (x // TOTAL) + slot - int(starts[s])
        if x < LOWEST_STATE:
            _require(bool(queue), "ends before the last symbol")
            x = x << 16 | queue.pop(0)
        lanes[i % len(lanes)] = x
    _require(not queue and set(lanes) == {LOWEST_STATE}, "does not end with the last symbol")
    return symbols


def normalized(counts: Counts) -> Counts:
    """Frequencies that sum to 2^14, none of a symbol that occurs 0, nearly in proportion.

    Rounded down first; what is left goes, one by one, to where it shortens the stream most.
    """
    share = counts * (TOTAL / counts.sum())
    frequencies = np.where(counts > 0, np.maximum(share.astype(np.int64), 1), 0)
    while (spare := TOTAL - int(frequencies.sum())) != 0:
        step = 1 if spare > 0 else -1
        new = frequencies + step
        possible = (counts > 0) & (new >= 1)
        gain = np.full(counts.size, -np.inf)
        ratio = np.log2(new[possible] / frequencies[possible])
        gain[possible] = counts[possible] * ratio
        frequencies[np.argsort(-gain, kind="stable")[: min(abs(spare), possible.sum())]] += step
    return frequencies


def table_bytes(frequencies: Counts) -> Bytes:
    """Lowest and highest symbol that occur, and the frequencies between as LEB128 numbers."""
    present = np.flatnonzero(frequencies)
    low, high = int(present[0]), int(present[-1])
    out = [low, high]
    for value in frequencies[low : high + 1]:
        value = int(value)
        while value > 127:
            out.append(value & 127 | 128)
            value >>= 7
        out.append(value)
    return np.array(out, np.uint8)


def split_stream(
    stream: Bytes, symbol_bits: int, lanes: int
) -> tuple[Counts, NDArray[np.uint32], NDArray[np.uint16]]:
    """Frequencies, states and words of a stream; FormatError if they are impossible."""
    low, high = symbol_range("rANS", stream, symbol_bits)
    frequencies = np.zeros(1 << symbol_bits, np.int64)
    at = 2
    for s in range(low, high + 1):
        value = shift = 0
        while True:
            _require(at < stream.size and shift <= PRECISION, "has a damaged table")
            byte = int(stream[at])
            value |= (byte & 127) << shift
            at, shift = at + 1, shift + 7
            if byte < 128:
                break
        _require(byte > 0 or shift == 7, "has a table that is not in canonical form")
        frequencies[s] = value
    complete = frequencies.sum() == TOTAL and frequencies[low] and frequencies[high]
    _require(bool(complete), f"has frequencies that do not sum to {TOTAL}")
    body = stream[at:].tobytes()
    _require(len(body) >= 4 * lanes and len(body) % 2 == 0, "is truncated")
    states = np.frombuffer(body[: 4 * lanes], "<u4").astype(np.uint32)
    _require(bool((states >= LOWEST_STATE).all()), "has an impossible state")
    return frequencies, states, np.frombuffer(body[4 * lanes :], "<u2").astype(np.uint16)


def _raw(values: NDArray[np.unsignedinteger], dtype: str) -> Bytes:
    return np.frombuffer(values.astype(dtype).tobytes(), np.uint8)
