"""Trellis-coded matrices: value = scale * level(state), the state a window of a bit stream.

Rows and columns are cut into tiles of 16 x 16, the last ones smaller. A tile of T weights in
row-major order at r / 16 bits a weight uses end(t) = floor((t + 1) r / 16) bits up to weight t,
N = end(T - 1) in all, stored most significant bit first in ceil(N / 8) bytes, tile row by tile
row, spare bits zero. The state of weight t is the L-bit window that ends before bit end(t),
first bit most significant: read cyclically in the tile (chain = 0), or in the joined streams of
`chain` consecutive tiles of a column block, with zeros before the start.

Levels, all arithmetic modulo 2^32: with x = M s (weyl, M the tensor `multiplier`), the normal
quantile of ((x >> 22) + 1/2) / 1024 in multiples of 2^-12; with x = 0x83DCD12D s (mul1), x hashed
once more (mul2), or x = 34038481 s + 76625530 (1mad), the sum of the four bytes of x less 510;
with x = 89226354 s + 64248484 (3inst) or 0xCBAC1FED s (mcg), the sum of both halves of
(x & 0x8FFF8FFF) ^ 0x3B603B60 read as half-precision numbers. A table is the tensor `levels`.

Source: Tseng et al., QTIP, arXiv 2406.11235; docs/format.md is normative.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from convex_caldera.certify.codec import (
    Array,
    Layout,
    QuantizerFormat,
    Record,
    Shape,
    boolean,
    finite,
    integer,
    one_of,
    real,
)
from convex_caldera.errors import FormatError

TILE = 16
LONGEST_TABLE = 12  # state bits of the code "table"
Bits = NDArray[np.uint8]
States = NDArray[np.uint32]


@cache
def _quantiles() -> NDArray[np.float32]:
    exact = [NormalDist().inv_cdf((i + 0.5) / 1024) for i in range(1024)]
    return (np.rint(4096 * np.array(exact)) / 4096).astype(np.float32)


def levels(code: str, states: States, multiplier: int = 0) -> NDArray[np.float32]:
    """Level of every state by a formula; `multiplier` is M of weyl."""
    s = states.astype(np.uint32)
    if code == "weyl":
        return _quantiles()[s * np.uint32(multiplier) >> np.uint32(22)]
    if code in ("3inst", "mcg"):
        x = s * np.uint32(0xCBAC1FED)
        if code == "3inst":
            x = s * np.uint32(89226354) + np.uint32(64248484)
        x = (x & np.uint32(0x8FFF8FFF)) ^ np.uint32(0x3B603B60)
        low = (x & np.uint32(0xFFFF)).astype(np.uint16).view(np.float16)
        high = (x >> np.uint32(16)).astype(np.uint16).view(np.float16)
        return low.astype(np.float32) + high.astype(np.float32)
    if code == "1mad":
        x = s * np.uint32(34038481) + np.uint32(76625530)
    else:
        x = s * np.uint32(0x83DCD12D)
    if code == "mul2":
        x = (x ^ (x >> np.uint32(15))) * np.uint32(0x9E3779B1)
    total = np.full(x.shape, -510, np.int32)
    for shift in (0, 8, 16, 24):
        total += (x >> np.uint32(shift) & np.uint32(0xFF)).astype(np.int32)
    return total.astype(np.float32)


def layout(record: Record, shape: Shape) -> Layout:
    rate = _sixteenths(record)
    heights, widths = _cuts(shape[0]), _cuts(shape[1])
    total = sum(
        rows * columns * _tile_bytes(h * w, rate) for h, rows in heights for w, columns in widths
    )
    tensors: Layout = {"codes": ("U8", (total,)), "scale": ("F32", (1,))}
    if record["row_scales"]:
        tensors["row_scale"] = ("F16", (shape[0],))
    if record["code"] == "weyl":
        tensors["multiplier"] = ("U32", (1,))
    if record["code"] == "table":
        tensors["levels"] = ("F16", (1 << record["state_bits"],))
    return tensors


def decode(record: Record, shape: Shape, tensors: Mapping[str, Array]) -> NDArray[np.float32]:
    rate, length = _sixteenths(record), record["state_bits"]
    states = np.empty(shape, np.uint32)
    for left, width, tiles in _columns(tensors["codes"], shape, rate):
        columns = states[:, left : left + width * tiles[0].shape[1]]
        top = 0
        for group in _groups(tiles, record["chain"]):
            part = _window_states(group, width, rate, length, cyclic=record["chain"] == 0)
            columns[top : top + len(part)] = part
            top += len(part)
    scale = finite(tensors["scale"], "scale").astype(np.float32)
    if record["row_scales"]:
        scale = scale * finite(tensors["row_scale"], "row_scale").astype(np.float32)
    if record["code"] == "table":
        level = finite(tensors["levels"], "levels").astype(np.float32)[states]
    else:
        word = int(tensors["multiplier"][0]) if record["code"] == "weyl" else 0
        level = levels(record["code"], states, word)
    values: NDArray[np.float32] = scale[:, None] * level
    return values


def _sixteenths(record: Record) -> int:
    """r, bits of sixteen weights."""
    rate = record["bits"] * 16
    beam, stored = record["encoder"] == "beam", record["code"] == "table"
    least, most = math.ceil(record["bits"]) + 1, 28 if beam else 16
    most = LONGEST_TABLE if stored else most
    if beam and stored:
        raise FormatError("a trellis with a table of levels is not searched by a beam")
    if rate != int(rate) or not least <= record["state_bits"] <= most:
        raise FormatError(f"a trellis of {record['bits']} bits, {record['state_bits']} of state")
    return int(rate)


def _tile_bytes(weights: int, rate: int) -> int:
    """Whole bytes of a stream of floor(T r / 16) bits."""
    return -(-(weights * rate // 16) // 8)


def _cuts(size: int) -> list[tuple[int, int]]:
    """(length, how many) of the full pieces and of the last short one."""
    pieces = [(TILE, size // TILE), (size % TILE, 1)]
    return [(length, count) for length, count in pieces if length and count]


def _columns(codes: Array, shape: Shape, rate: int) -> Iterator[tuple[int, int, list[Bits]]]:
    """Per kind of column block: first column, width, and the bits of its tiles.

    Bits come per kind of tile row, each (tile rows, tile columns, N).
    """
    heights, widths = _cuts(shape[0]), _cuts(shape[1])
    at, by_width = 0, [list[Bits]() for _ in widths]
    for h, rows in heights:
        sizes = [_tile_bytes(h * w, rate) for w, _ in widths]
        row_bytes = sum(size * count for size, (_, count) in zip(sizes, widths, strict=True))
        block = np.asarray(codes[at : at + rows * row_bytes]).reshape(rows, row_bytes)
        at, x = at + rows * row_bytes, 0
        for bits, size, (w, count) in zip(by_width, sizes, widths, strict=True):
            raw = block[:, x : x + size * count].reshape(rows, count, size)
            bits.append(_unpacked(raw, h * w * rate // 16))
            x += size * count
    left = 0
    for bits, (w, count) in zip(by_width, widths, strict=True):
        yield left, w, bits
        left += w * count


def _unpacked(raw: Bits, length: int) -> Bits:
    bits = np.unpackbits(np.ascontiguousarray(raw), axis=-1)
    if bits[..., length:].any():
        raise FormatError("spare bits after a trellis tile are not zero")
    return bits[..., :length]


def _groups(tiles: list[Bits], chain: int) -> Iterator[list[Bits]]:
    """Runs of tile rows whose streams are joined, each run a list of (runs, columns, N)."""
    if chain == 0:
        yield from ([bits] for bits in tiles)
        return
    full = tiles[0]
    whole = len(full) // chain
    joined = full[: whole * chain].reshape(whole, chain, *full.shape[1:])
    if whole:
        yield [joined[:, i] for i in range(chain)]
    rest = [full[i : i + 1] for i in range(whole * chain, len(full))]
    rest += tiles[1:]
    for start in range(0, len(rest), chain):
        yield rest[start : start + chain]


def _window_states(group: list[Bits], width: int, rate: int, length: int, cyclic: bool) -> States:
    """States (rows, columns) of runs of tiles, one array of bits per place in the run."""
    sizes = [_weights(bits.shape[-1], width, rate) for bits in group]
    starts = np.cumsum([0, *(bits.shape[-1] for bits in group)])
    ends = [
        start + np.arange(1, T + 1) * rate // 16 for start, T in zip(starts, sizes, strict=False)
    ]
    stream = np.concatenate(group, axis=-1)
    position = np.concatenate(ends) - length
    if not cyclic:
        stream = np.concatenate([np.zeros((*stream.shape[:2], length), np.uint8), stream], axis=-1)
        position = position + length
    runs, columns, total = stream.shape
    states = np.zeros((runs, columns, len(position)), np.uint32)
    for j in range(length):
        states = (states << np.uint32(1)) | stream[..., (position + j) % total]
    grid = states.reshape(runs, columns, -1, width).transpose(0, 2, 1, 3)
    return grid.reshape(runs * grid.shape[1], columns * width)


def _weights(num_bits: int, width: int, rate: int) -> int:
    """T of a tile of N = floor(T r / 16) bits; T is a multiple of the width."""
    return next(h * width for h in range(1, TILE + 1) if h * width * rate // 16 == num_bits)


FORMAT = QuantizerFormat(
    {
        "bits": real(1, 8),
        "state_bits": integer(2, 28),
        "code": one_of("weyl", "mul1", "mul2", "1mad", "3inst", "mcg", "table"),
        "chain": integer(0),
        "encoder": one_of("viterbi", "beam"),
        "survivors": integer(1),
        "row_scales": boolean,
    },
    layout,
    decode,
)
