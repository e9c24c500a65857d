"""Entropy-coded codes back to their fixed width: rANS and Huffman streams, in numpy.

Both cut the bit stream of packed codes into symbols of w bits and code these; docs/format.md,
section 5.0, is normative. A rANS stream has L lanes, a Huffman stream P parts; numpy takes one
symbol of every lane or part at a time, so a matrix of 2^24 codes takes 2^14 rounds. With C
symbols, L = P' = the largest power of two that is at most C / 2^14 and 1024, at least 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from convex_caldera.certify.codec import Array, Option, Record, integer
from convex_caldera.certify.decode_bits import packed_size
from convex_caldera.errors import FormatError

PRECISION = 14
LOWEST_STATE = 1 << 16
LONGEST = 12
Symbols = NDArray[np.uint8]


@dataclass(frozen=True)
class CoderFormat:
    """Options of a coder, and its decoder: (stream, number of symbols, their bits) -> symbols."""

    options: Mapping[str, Option]
    decode: Callable[[Array, int, int], Symbols]


def fixed_width(record: Record, stream: Array, num_bytes: int) -> Symbols:
    """The packed codes, `num_bytes` long, of an entropy-coded stream. Raises FormatError."""
    width = record["symbol_bits"]
    count = 8 * num_bytes // width
    if packed_size(count, width) != num_bytes:
        raise FormatError(f"{num_bytes} bytes of codes are no stream of {width}-bit symbols")
    if not count:
        _require(not len(stream), "bytes for no symbols")
        return np.zeros(num_bytes, np.uint8)
    symbols = CODERS[record["kind"]].decode(stream, count, width)
    bits = np.unpackbits(symbols[:, None], axis=1, count=width, bitorder="little")
    return np.packbits(bits.ravel(), bitorder="little")


def parts(count: int) -> int:
    """Lanes or parts that `count` symbols are spread over."""
    found = 1
    while found < 1024 and 2 * found * 16384 <= count:
        found *= 2
    return found


# --- rANS -----------------------------------------------------------------------------------


def decode_rans(stream: Array, count: int, width: int) -> Symbols:
    """One symbol of each lane per round; lanes that fall below 2^16 read words in their order."""
    frequencies, at = _frequencies(stream, width)
    lanes = parts(count)
    _require(len(stream) >= at + 4 * lanes and (len(stream) - at) % 2 == 0, "truncated")
    x = np.frombuffer(stream[at : at + 4 * lanes].tobytes(), "<u4").astype(np.int64)
    words = np.frombuffer(stream[at + 4 * lanes :].tobytes(), "<u2").astype(np.int64)
    _require(bool((x >= LOWEST_STATE).all()), "an impossible state")
    owner = np.repeat(np.arange(1 << width), frequencies)
    starts = np.cumsum(frequencies) - frequencies
    offset = np.arange(1 << PRECISION) - starts[owner]
    symbols = np.empty(count, np.uint8)
    read = 0
    for begin in range(0, count, lanes):
        active = x[: min(lanes, count - begin)]
        slot = active & ((1 << PRECISION) - 1)
        symbol = owner[slot]
        symbols[begin : begin + len(active)] = symbol
        active[:] = frequencies[symbol] * (active >> PRECISION) + offset[slot]
        low = np.flatnonzero(active < LOWEST_STATE)
        _require(read + len(low) <= len(words), "ends before the last symbol")
        active[low] = active[low] << 16 | words[read : read + len(low)]
        read += len(low)
    _require(
        read == len(words) and bool((x == LOWEST_STATE).all()), "goes on after the last symbol"
    )
    return symbols


def _frequencies(stream: Array, width: int) -> tuple[NDArray[np.int64], int]:
    """Frequencies of all symbols, and where the table ends."""
    low, high = _range(stream, width)
    found = np.zeros(1 << width, np.int64)
    at = 2
    for symbol in range(low, high + 1):
        digits = []
        while not digits or digits[-1] >= 128:
            _require(at < len(stream) and len(digits) < 3, "a damaged table")
            digits.append(int(stream[at]))
            at += 1
        _require(len(digits) == 1 or digits[-1] > 0, "a number that is not in canonical form")
        found[symbol] = sum((digit & 127) << 7 * k for k, digit in enumerate(digits))
    sound = found.sum() == 1 << PRECISION and found[low] > 0 and found[high] > 0
    _require(bool(sound), "frequencies that do not sum to 2^14")
    return found, at


# --- Huffman --------------------------------------------------------------------------------


def decode_huffman(stream: Array, count: int, width: int) -> Symbols:
    """One symbol of each part per round."""
    low, high = _range(stream, width)
    if low == high:
        _require(len(stream) == 2, "bytes after its only symbol")
        return np.full(count, low, np.uint8)
    size = -(-count // parts(count))
    pieces = -(-count // size)
    table, at = _lengths(stream, low, high)
    _require(len(stream) >= at + 4 * pieces, "truncated")
    sizes = np.frombuffer(stream[at : at + 4 * pieces].tobytes(), "<u4").astype(np.int64)
    body = np.append(stream[at + 4 * pieces :], np.zeros(3, np.uint8)).astype(np.int64)
    _require(int(sizes.sum()) == len(body) - 3, "parts that do not fill it")
    ends = 8 * np.cumsum(sizes)
    bit = ends - 8 * sizes
    symbols = np.zeros((pieces, size), np.uint8)
    for k in range(size):
        active = pieces - (k >= count - (pieces - 1) * size)  # the last part may be shorter
        byte = np.minimum(bit[:active] >> 3, len(body) - 3)
        word = body[byte] | body[byte + 1] << 8 | body[byte + 2] << 16
        entry = table[(word >> (bit[:active] & 7)) & ((1 << LONGEST) - 1)]
        symbols[:active, k] = entry >> 4
        bit[:active] += entry & 15
    _require(bool(((bit + 7) // 8 * 8 == ends).all()), "a part that does not end as it should")
    spare = body[(ends - 1) // 8] >> np.where(bit & 7, bit & 7, 8)
    _require(not spare.any(), "spare bits that are set")
    return symbols.ravel()[:count]


def _lengths(stream: Array, low: int, high: int) -> tuple[NDArray[np.int64], int]:
    """For each 12 bits to come, the first least significant: 16 * symbol + length; and the end."""
    half = (high - low) // 2 + 1
    _require(len(stream) >= 2 + half, "truncated")
    nibbles = [int(b) >> shift & 15 for b in stream[2 : 2 + half] for shift in (0, 4)]
    used, spare = nibbles[: high - low + 1], nibbles[high - low + 1 :]
    sound = used[0] and used[-1] and max(used) <= LONGEST and not any(spare)
    kraft = sum(1 << (LONGEST - length) for length in used if length) if sound else 0
    _require(kraft == 1 << LONGEST, "lengths that make no complete code")
    table = np.zeros(1 << LONGEST, np.int64)
    code = 0  # of the full twelve bits: codes follow each other in this order
    for length, symbol in sorted((n, low + k) for k, n in enumerate(used) if n):
        first = int(f"{code >> (LONGEST - length):0{length}b}"[::-1], 2)
        table[first :: 1 << length] = 16 * symbol + length
        code += 1 << (LONGEST - length)
    return table, 2 + half


def _range(stream: Array, width: int) -> tuple[int, int]:
    _require(len(stream) >= 2, "truncated")
    low, high = int(stream[0]), int(stream[1])
    _require(low <= high < 1 << width, f"symbols {low} .. {high} out of range")
    return low, high


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise FormatError(f"an entropy-coded stream with {what}")


_OPTIONS = {"symbol_bits": integer(1, 8)}
CODERS = {
    "huffman": CoderFormat(_OPTIONS, decode_huffman),
    "rans": CoderFormat(_OPTIONS, decode_rans),
}
