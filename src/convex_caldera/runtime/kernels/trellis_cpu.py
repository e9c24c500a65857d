"""Trellis products on the CPU, straight from the packed bytes, a tile of 16 x 16 at a time.

A state is an L-bit window of a bit stream (`quantizers.trellis_stream`), so that any tile decodes
alone once the 32 bits before it are known: the end of its own stream where tiles bite their tails,
the end of the stream above in a chain. A tile's 256 levels take 1 KiB and are used up at once,

    y_i += scale_i sum_c level(state_ic) x_c      over the columns c of the tile,

sixteen columns in the lanes of one register, for up to `DIRECT_TOKENS` vectors x. For more a
slice of rows is decoded and multiplied as a matrix. Levels are computed from the states by the
formulas of `quantizers.trellis_codes`; `weyl` has a table of 4 KiB, `table` the one that is stored
with the matrix, as float32 at most 16 KiB. Where the processor has
the instructions and tiles are whole, `trellis_wide` does the same in a third of the time.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from convex_caldera.core.protocols import FittedQuantizer
from convex_caldera.quantizers.trellis import FittedTrellis, Trellis
from convex_caldera.quantizers.trellis_codes import (
    BYTE_SUM_CODES,
    BYTE_SUM_MEAN,
    QUANTILE_BITS,
    Code,
    quantiles,
)
from convex_caldera.quantizers.trellis_simd import (
    add_word,
    exclusive_or,
    load,
    load_words,
    multiply_word,
    shift_right,
    store,
)
from convex_caldera.quantizers.trellis_stream import RATE_UNIT, TILE, step_ends
from convex_caldera.runtime.kernels import trellis_wide
from convex_caldera.runtime.kernels.reference import (
    SLICE_VALUES,
    Slices,
    product,
    product_transposed,
)
from convex_caldera.runtime.kernels.trellis_lanes import (
    byte_sum_levels,
    half_sum_levels,
    load_swapped,
    multiply_add,
    table_levels,
    times,
    windows_by_eight,
    windows_by_four,
)
from convex_caldera.runtime.kernels.trellis_wide import BYTE_SUMS, HALF_SUMS, STORED, WEYL, lines

DIRECT_TOKENS = 4  # beyond it a matrix product of decoded slices is faster
_PREFIX = 32  # bits before a tile that its first windows may see; L <= 28
_HEAD = 16  # bytes that the windows beginning before a tile see of it, at most
_WHOLE = 57  # bits of a 64-bit load that are valid at any bit offset
Array = NDArray[np.int64]

_HALVES_CODES = {"3inst": (89226354, 64248484), "mcg": (0xCBAC1FED, 0)}  # multiplier, addend


class _Format(NamedTuple):
    """What the compiled loops know of a matrix; no arrays, which would be counted at every use."""

    m: int
    n: int
    sixteenths: int
    state_bits: int
    chain: int
    kind: int
    multiplier: np.uint32
    addend: np.uint32
    mix: np.uint32  # xor-shift of `mul2`, 0 for none
    second: np.uint32
    group: int  # neighbouring windows that one 64-bit load holds, 8 or 4


def multiply(fitted: FittedQuantizer, packed: Tensor, x: Tensor) -> Tensor:
    """x (tokens, n) -> x Q^T (tokens, m), float32."""
    assert isinstance(fitted, FittedTrellis)
    (m, n), tokens = fitted.shape, x.shape[0]
    if not 0 < tokens <= DIRECT_TOKENS:
        return product(decoded_slices(fitted, packed), x, m)
    padded = torch.nn.functional.pad(x.detach(), (0, -n % TILE)).contiguous()
    out = np.empty((tokens, m), np.float32)
    if trellis_wide.suits(m, n, fitted.quantizer.state_bits):
        layout, inputs = _format(fitted.shape, fitted.quantizer, fitted.code)[0], padded.numpy()
        threads = torch.get_num_threads()
        trellis_wide.multiply(
            packed.numpy(), layout, _table(fitted), _units(fitted), inputs, out, threads
        )
        return torch.from_numpy(out)
    sums = lines(tokens * TILE * TILE)
    args = (
        *_format(fitted.shape, fitted.quantizer, fitted.code),
        _table(fitted),
        *_scratch(),
        sums,
        padded.view(-1).numpy(),
    )
    _multiply(packed.numpy(), *args, _units(fitted), out)
    return torch.from_numpy(out)


def multiply_transposed(fitted: FittedQuantizer, packed: Tensor, y: Tensor) -> Tensor:
    """y (tokens, m) -> y Q (tokens, n), float32."""
    assert isinstance(fitted, FittedTrellis)
    return product_transposed(decoded_slices(fitted, packed), y, fitted.shape[1])


def decoded_slices(fitted: FittedTrellis, packed: Tensor) -> Slices:
    """Slices of rows and their values (rows, n), float32; the buffer is used again."""
    m, n = fitted.shape
    step = max(SLICE_VALUES // (n * TILE), 1) * TILE
    buffer = np.empty((min(step, m), n), np.float32)
    layout, units = (
        (*_format(fitted.shape, fitted.quantizer, fitted.code), _table(fitted), *_scratch()),
        _units(fitted),
    )
    for start in range(0, m, step):
        rows = slice(start, min(start + step, m))
        out = buffer[: rows.stop - rows.start]
        _decode(packed.numpy(), *layout, start // TILE, units[rows], out.reshape(-1))
        yield rows, torch.from_numpy(out)


def _table(fitted: FittedTrellis) -> NDArray[np.float32]:
    """What levels are looked up in: the stored ones, or weyl's quantiles."""
    return fitted.code.table() if fitted.code.name == "table" else quantiles()


def _scratch() -> tuple[NDArray[np.uint8], NDArray[np.uint32], NDArray[np.float32]]:
    """Room for a tile's stream and what a load may read beyond it, a row's states, levels."""
    stream = np.zeros(_PREFIX // 8 + TILE * TILE + 8, np.uint8)
    return stream, np.zeros(TILE, np.uint32), lines(TILE * TILE)


def _units(fitted: FittedTrellis) -> NDArray[np.float32]:
    """What levels are multiplied by, row by row, rounded as the quantizer does."""
    rows = torch.ones(1) if fitted.row_scale is None else fitted.row_scale.float()
    return (fitted.scale * rows).expand(fitted.shape[0]).contiguous().numpy()


@lru_cache(maxsize=256)
def _format(shape: tuple[int, int], q: Trellis, code: Code) -> tuple[_Format, Array, Array]:
    """The format, the bit where each group's first window starts, and each lane's shift."""
    if code.name == "weyl":
        constants = (WEYL, code.multiplier, 0, 0, 1)
    elif code.name == "table":
        constants = (STORED, 1, 0, 0, 1)
    elif code.name in BYTE_SUM_CODES:
        constants = (BYTE_SUMS, *BYTE_SUM_CODES[code.name])
    else:
        constants = (HALF_SUMS, *_HALVES_CODES[code.name], 0, 1)
    ends = step_ends(q.sixteenths, TILE)
    by_eight = ends.reshape(-1, 8)
    fits = q.state_bits + int((by_eight[:, -1] - by_eight[:, 0]).max()) <= _WHOLE
    group = 8 if fits else 4
    firsts = ends[::group]
    shifts = 64 - q.state_bits - (ends - np.repeat(firsts, group))
    kind, *numbers = constants
    multiplier, addend, mix, second = (np.uint32(number) for number in numbers)
    rates = q.sixteenths, q.state_bits, q.chain
    layout = _Format(*shape, *rates, kind, multiplier, addend, mix, second, group)
    return layout, firsts + (_PREFIX - q.state_bits), shifts


@njit(cache=True, nogil=True, _nrt=False)
def _tile_at(f, i, j):  # type: ignore[no-untyped-def]
    """(first byte, bits) of tile j of tile row i."""
    height, rest = min(TILE, f.m - TILE * i), f.n % TILE
    width = min(TILE, f.n - TILE * j)
    row = f.n // TILE * (2 * f.sixteenths) + (rest * f.sixteenths + 7) // 8
    first = i * row + j * ((height * f.sixteenths + 7) // 8)
    return first, height * width * f.sixteenths // RATE_UNIT


@njit(cache=True, nogil=True, _nrt=False)
def _bits_before(packed, f, i, j):  # type: ignore[no-untyped-def]
    """The `_PREFIX` bits that the stream holds before tile (i, j), the latest lowest."""
    value, held, tile = np.uint64(0), 0, i
    while held < _PREFIX:
        if f.chain > 0:
            if tile % f.chain == 0:
                break
            tile -= 1
        first, size = _tile_at(f, tile, j)
        last = first + ((size - 1) >> 3)
        spare = 8 * (last - first + 1) - size
        found = np.uint64(0)
        for byte in range(max(first, last - 4), last + 1):
            found = (found << np.uint64(8)) | np.uint64(packed[byte])
        found >>= np.uint64(spare)
        count = min(size, _PREFIX - held)
        found &= (np.uint64(1) << np.uint64(count)) - np.uint64(1)
        value |= found << np.uint64(held)
        held += count
    return value


@njit(cache=True, nogil=True, _nrt=False)
def _fill(packed, f, i, j, count, stream):  # type: ignore[no-untyped-def]
    """Write `count` bytes of tile (i, j) into `stream` behind the `_PREFIX` bits before it."""
    before = _bits_before(packed, f, i, j)
    for byte in range(4):
        stream[byte] = np.uint8((before >> np.uint64(24 - 8 * byte)) & np.uint64(255))
    first, _ = _tile_at(f, i, j)
    for byte in range(count):
        stream[4 + byte] = packed[first + byte]


@njit(cache=True, nogil=True, _nrt=False)
def _row_states(f, stream, row, width, states):  # type: ignore[no-untyped-def]
    """States of one row of a tile narrower than 16 columns, one by one."""
    mask = (np.uint64(1) << np.uint64(f.state_bits)) - np.uint64(1)
    for c in range(width):
        end = _PREFIX + ((row * width + c + 1) * f.sixteenths >> 4)
        start = end - f.state_bits
        word = load_swapped(stream, start >> 3)
        word >>= np.uint64(64 - f.state_bits - (start & 7))
        states[c] = np.uint32(word & mask)


@njit(cache=True, nogil=True, _nrt=False)
def _tile_levels(packed, f, firsts, shifts, table, i, j, stream, states, levels):  # type: ignore[no-untyped-def]
    """Levels of tile (i, j) into `levels`, sixteen a row; finite ones beyond its width."""
    height, width = min(TILE, f.m - TILE * i), min(TILE, f.n - TILE * j)
    first, size = _tile_at(f, i, j)
    count = (size + 7) >> 3
    # read in place are windows that begin within the tile; none that a load would overrun
    in_place = width == TILE and first + count + 8 <= len(packed)
    begin = _PREFIX - firsts[0] if in_place else TILE * TILE * 8
    _fill(packed, f, i, j, min(count, _HEAD) if in_place else count, stream)
    mask = np.uint32((1 << f.state_bits) - 1)
    for row in range(height):
        if width < TILE:
            _row_states(f, stream, row, width, states)
            x = load_words(states, 0)
        else:
            bit, source = row * f.sixteenths, stream
            if bit >= begin:
                bit, source = 8 * first + bit - _PREFIX, packed
            if f.group == 8:
                x = windows_by_eight(source, bit, firsts, shifts, mask)
            else:
                x = windows_by_four(source, bit, firsts, shifts, mask)
        x = multiply_word(x, f.multiplier)
        if f.kind == STORED:
            level = table_levels(x, np.uint32(0), table)
        elif f.kind == WEYL:
            level = table_levels(x, np.uint32(32 - QUANTILE_BITS), table)
        elif f.kind == BYTE_SUMS:
            x = add_word(x, f.addend)
            if f.mix:
                x = multiply_word(exclusive_or(x, shift_right(x, f.mix)), f.second)
            level = byte_sum_levels(x, np.int32(BYTE_SUM_MEAN))
        else:
            level = half_sum_levels(add_word(x, f.addend))
        store(levels, TILE * row, level)


@njit(cache=True, nogil=True, _nrt=False)
def _multiply(packed, f, firsts, shifts, table, stream, states, levels, sums, x, units, out):  # type: ignore[no-untyped-def]
    tokens, blocks = out.shape[0], (f.n + TILE - 1) // TILE
    for i in range((f.m + TILE - 1) // TILE):
        height = min(TILE, f.m - TILE * i)
        for at in range(len(sums)):
            sums[at] = np.float32(0.0)
        for j in range(blocks):
            _tile_levels(packed, f, firsts, shifts, table, i, j, stream, states, levels)
            for token in range(tokens):
                inputs = load(x, TILE * (token * blocks + j))
                for row in range(height):
                    at = TILE * (TILE * token + row)
                    level = load(levels, TILE * row)
                    store(sums, at, multiply_add(level, inputs, load(sums, at)))
        for token in range(tokens):
            for row in range(height):
                at = TILE * (TILE * token + row)
                total = np.float32(0.0)
                for c in range(TILE):
                    total += sums[at + c]
                out[token, TILE * i + row] = total * units[TILE * i + row]


@njit(cache=True, nogil=True, _nrt=False)
def _decode(packed, f, firsts, shifts, table, stream, states, levels, first, units, out):  # type: ignore[no-untyped-def]
    rows, n = len(units), f.n
    for i in range((rows + TILE - 1) // TILE):
        for j in range((n + TILE - 1) // TILE):
            _tile_levels(packed, f, firsts, shifts, table, first + i, j, stream, states, levels)
            for row in range(min(TILE, rows - TILE * i)):
                at, unit = (TILE * i + row) * n + TILE * j, units[TILE * i + row]
                if n - TILE * j >= TILE:
                    store(out, at, times(load(levels, TILE * row), unit))
                else:
                    for c in range(n - TILE * j):
                        out[at + c] = levels[TILE * row + c] * unit
