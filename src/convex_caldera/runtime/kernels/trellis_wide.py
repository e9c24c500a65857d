"""Trellis products by 512-bit instructions: byte permutations make the windows of a row.

For matrices of whole tiles on processors with AVX-512 VBMI and VNNI; all others take the way of
`trellis_cpu`. Sixteen weights of a row, whose windows end at bits e_c of the stream, take

    load        64 bytes from the fourth before the row's first on
    vpermb      lane c gets the four bytes that end with bit e_c's own, the last one lowest
    shift, and  right by what follows e_c in its byte, 0 .. 7;  so L + 7 <= 32
    vpmulld     x = M s + A of the code
    vpdpbusd    the sum of the four bytes of x, less 510          (byte sums)
    vgatherdps  the quantile of x >> 22, from 4 KiB               (weyl)
                or the stored level of s itself                   (table)
    fma         times the inputs, onto the row's sixteen partial sums

which is 9 vector operations for byte sums, on two ports; the quantiles' sixteen loads take about
as long by themselves. The bytes before a tile's first row are those at its own end, or at that of
the tile above in a chain; they are rotated into the first load. Tile rows are shared out among
torch's threads.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache, partial
from typing import Any

import numpy as np
from llvmlite import binding, ir  # type: ignore[import-untyped]
from numba import njit
from numba.core import cgutils, types
from numba.extending import intrinsic, models, register_model
from numpy.typing import NDArray

from convex_caldera.quantizers.trellis_codes import QUANTILE_BITS
from convex_caldera.quantizers.trellis_simd import (
    LANES,
    add_word,
    exclusive_or,
    lanes,
    load,
    load_words,
    multiply_word,
    shift_right,
    store,
    words,
)
from convex_caldera.quantizers.trellis_stream import TILE, step_ends
from convex_caldera.runtime.kernels.trellis_lanes import half_sum_levels, multiply_add

NEEDED = ("avx512f", "avx512bw", "avx512vbmi", "avx512vnni")
MAX_STATE_BITS = 25  # a window and what precedes it in its first byte lie in four bytes
BYTES = 64
THREAD_WEIGHTS = 1 << 20  # what is worth waking a thread for: a fifth of a millisecond

WEYL, BYTE_SUMS, HALF_SUMS, MIXED_SUMS, STORED = 0, 1, 2, 3, 4  # families of codes
Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

_F32 = ir.VectorType(ir.FloatType(), LANES)
_I32 = ir.VectorType(ir.IntType(32), LANES)
_I8 = ir.VectorType(ir.IntType(8), BYTES)
_WORD = ir.IntType(32)


class BytesType(types.Type):
    """Numba's name for 64 bytes held in a register."""

    def __init__(self) -> None:
        super().__init__(name="Byte64")


stream_bytes = BytesType()


@register_model(BytesType)
class _BytesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, fe_type: Any) -> None:
        super().__init__(manager, fe_type, _I8)


@cache
def available() -> bool:
    """Whether this processor has the instructions."""
    features = binding.get_host_cpu_features()
    return all(features.get(name, False) for name in NEEDED)


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    base = context.make_array(array_type)(context, builder, array).data
    return builder.gep(base, [index])


def _splat(builder: Any, scalar: Any) -> Any:
    undefined = ir.Constant(_I32, ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(_WORD, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(_I32, [0] * LANES))


def _call(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(function, arguments)


def _vector(context: Any, builder: Any, kind: Any, array_type: Any, array: Any, at: Any) -> Any:
    place = _pointer(context, builder, array_type, array, at)
    return builder.load(builder.bitcast(place, kind.as_pointer()), align=1)


@intrinsic
def load_bytes(typing: Any, array: Any, index: Any) -> Any:
    """array[index : index + 64] of a byte array."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _vector(context, builder, _I8, signature.args[0], args[0], args[1])

    return stream_bytes(array, types.intp), generate


@intrinsic
def load_four(typing: Any, array: Any, index: Any) -> Any:
    """The four bytes array[index : index + 4] as one word, in the order of memory."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        at = _pointer(context, builder, signature.args[0], args[0], args[1])
        return builder.load(builder.bitcast(at, _WORD.as_pointer()), align=1)

    return types.uint32(array, types.intp), generate


@intrinsic
def with_before(typing: Any, value: Any, before: Any) -> Any:
    """Four bytes `before`, as `load_four` reads them, then the first sixty of `value`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value, before = builder.bitcast(args[0], _I32), _splat(builder, args[1])
        order = ir.Constant(_I32, [LANES, *range(LANES - 1)])
        return builder.bitcast(builder.shuffle_vector(value, before, order), _I8)

    return stream_bytes(stream_bytes, types.uint32), generate


@intrinsic
def windows_of(typing: Any, value: Any, places: Any, shifts: Any, mask: Any) -> Any:
    """Sixteen states of a row from its 64 bytes.

    `places`, 64 bytes: which byte of `value` each byte of a lane is; `shifts`, words: what
    follows each window in its last byte.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value, places, shifts, mask = args
        taken = _call(builder, "llvm.x86.avx512.permvar.qi.512", _I8, [value, places])
        moved = builder.lshr(builder.bitcast(taken, _I32), shifts)
        return builder.and_(moved, _splat(builder, mask))

    return words(stream_bytes, stream_bytes, words, types.uint32), generate


@intrinsic
def byte_sums(typing: Any, word: Any) -> Any:
    """Sum of the four bytes less 510, as floats."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        start = ir.Constant(_I32, [-510] * LANES)
        ones = ir.Constant(_I8, [1] * BYTES)
        arguments = [start, builder.bitcast(args[0], _I8), ones]
        total = _call(builder, "llvm.x86.avx512.vpdpbusd.512", _I32, arguments)
        return builder.sitofp(total, _F32)

    return lanes(words), generate


@intrinsic
def gathered(typing: Any, index: Any, table: Any) -> Any:
    """table[index], `table` a float32 array."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        base = context.make_array(signature.args[1])(context, builder, args[1]).data
        arguments = [
            ir.Constant(_F32, [0.0] * LANES),
            builder.bitcast(base, ir.IntType(8).as_pointer()),
            args[0],
            ir.Constant(ir.VectorType(ir.IntType(1), LANES), [1] * LANES),
            ir.Constant(_WORD, 4),
        ]
        return _call(builder, "llvm.x86.avx512.mask.gather.dps.512", _F32, arguments)

    return lanes(words, table), generate


@lru_cache(maxsize=64)
def row_tables(sixteenths: int, state_bits: int) -> tuple[Bytes, NDArray[np.uint32]]:
    """Places (16, 64) and shifts (16, 16) of the windows of a tile's rows, flat.

    Row r reads the 64 bytes from byte r R / 8 - 4 of its tile on, R its bits, the first ones (of
    which `_first_rows` knows the number) those that begin four bytes before the tile.
    """
    assert state_bits <= MAX_STATE_BITS
    begins = np.maximum(np.arange(TILE) * sixteenths // 8, 0) - 4
    begins[: _first_rows(sixteenths)] = -4
    ends = np.arange(TILE)[:, None] * sixteenths + step_ends(sixteenths, TILE)
    last = (ends - 1) >> 3
    shifts = (8 * (last + 1) - ends).astype(np.uint32)
    places = (last - begins[:, None])[:, :, None] - np.arange(4)
    return places.astype(np.uint8).reshape(-1), shifts.reshape(-1)


@njit(cache=True)
def _first_rows(sixteenths):  # type: ignore[no-untyped-def]
    """Rows that begin less than four bytes into the tile."""
    return (31 + sixteenths) // sixteenths


def suits(m: int, n: int, state_bits: int) -> bool:
    """Whether a matrix can be multiplied here, on this processor."""
    return available() and m % TILE == 0 and n % TILE == 0 and state_bits <= MAX_STATE_BITS


def multiply(
    packed: Bytes, f: Any, table: Floats, units: Floats, x: Floats, out: Floats, threads: int
) -> None:
    """out (tokens, m) = x (tokens, n) Q^T with levels times `units` (m,) row by row.

    Args:
        packed: the codes of a matrix that `suits`.
        f: its format, as `trellis_cpu` describes it.
        table: the quantiles, or the levels of a stored table.
        threads: at most; each gets at least `THREAD_WEIGHTS` weights.
    """
    places, shifts = row_tables(f.sixteenths, f.state_bits)
    kind = MIXED_SUMS if f.mix else f.kind
    run, rows = kernel(kind, len(out) == 1, f.sixteenths % 8 == 0), f.m // TILE
    inputs = np.ascontiguousarray(x).reshape(-1)
    count = max(1, min(threads, f.m * f.n // THREAD_WEIGHTS, rows))

    def part(index: int) -> None:
        spare, sums = np.zeros(2 * f.sixteenths + BYTES, np.uint8), lines(len(out) * TILE * TILE)
        first, last = index * rows // count, (index + 1) * rows // count
        run(packed, f, places, shifts, table, spare, sums, inputs, units, first, last, out)

    if count == 1:
        part(0)
    else:
        list(_pool(count, os.getpid()).map(part, range(count)))


@lru_cache(maxsize=1)
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Threads that stay; a forked process makes its own."""
    del process
    return ThreadPoolExecutor(threads, thread_name_prefix="trellis-product")


def lines(count: int) -> Floats:
    """Zeros that begin with a cache line, so that no vector straddles two."""
    room = np.zeros(count + 16, np.float32)
    skipped = -room.ctypes.data % 64 // 4
    return room[skipped : skipped + count]


@njit(forceinline=True, _nrt=False)
def _row_levels(kind, piece, places, shifts, f, mask, table):  # type: ignore[no-untyped-def]
    s = windows_of(piece, places, shifts, mask)
    if kind == STORED:
        return gathered(s, table)
    s = multiply_word(s, f.multiplier)
    if kind == WEYL:
        return gathered(shift_right(s, np.uint32(32 - QUANTILE_BITS)), table)
    s = add_word(s, f.addend)
    if kind == HALF_SUMS:
        return half_sum_levels(s)
    if kind == MIXED_SUMS:
        s = multiply_word(exclusive_or(s, shift_right(s, f.mix)), f.second)
    return byte_sums(s)


@njit(forceinline=True, _nrt=False)
def _add_row(single, level, row, tokens, blocks, j, x, sums):  # type: ignore[no-untyped-def]
    if single:
        product = multiply_add(level, load(x, TILE * j), load(sums, TILE * row))
        store(sums, TILE * row, product)
    else:
        for token in range(tokens):
            at, inputs = TILE * (TILE * token + row), load(x, TILE * (token * blocks + j))
            store(sums, at, multiply_add(level, inputs, load(sums, at)))


@njit(forceinline=True, _nrt=False)
def _rows(  # type: ignore[no-untyped-def]
    kind, single, alike, packed, f, places, shifts, table, spare, sums, x, units, first, last, out
):
    """Tile rows first .. last - 1 of out (tokens, m); `spare` has room for a tile and more."""
    tokens, blocks, size = out.shape[0], f.n // TILE, 2 * f.sixteenths
    mask, ahead = np.uint32((1 << f.state_bits) - 1), _first_rows(f.sixteenths)
    same_places = load_bytes(places, BYTES * (TILE - 1))
    same_shifts = load_words(shifts, LANES * (TILE - 1))
    for i in range(first, last):
        sums[:] = np.float32(0.0)
        for j in range(blocks):
            at = (i * blocks + j) * size
            before, source = np.uint32(0), packed
            if f.chain == 0:
                before = load_four(packed, at + size - 4)
            elif i % f.chain:
                before = load_four(packed, at - blocks * size + size - 4)
            if at + size + BYTES > len(packed):
                for byte in range(size):
                    spare[byte] = packed[at + byte]
                source, at = spare, 0
            head = with_before(load_bytes(source, at), before)
            for row in range(ahead):
                take, by = load_bytes(places, BYTES * row), load_words(shifts, LANES * row)
                level = _row_levels(kind, head, take, by, f, mask, table)
                _add_row(single, level, row, tokens, blocks, j, x, sums)
            for row in range(ahead, TILE):
                piece = load_bytes(source, at + (row * f.sixteenths >> 3) - 4)
                take, by = same_places, same_shifts
                if not alike:
                    take, by = load_bytes(places, BYTES * row), load_words(shifts, LANES * row)
                level = _row_levels(kind, piece, take, by, f, mask, table)
                _add_row(single, level, row, tokens, blocks, j, x, sums)
        for token in range(tokens):
            for row in range(TILE):
                total = np.float32(0.0)
                for c in range(TILE):
                    total += sums[TILE * (TILE * token + row) + c]
                out[token, TILE * i + row] = total * units[TILE * i + row]


def kernel(kind: int, single: bool, alike: bool) -> Callable[..., None]:
    """The compiled loop for a family of codes, for one token or several, for rows of whole bytes

    or not. These are constants of it, which inlining carries into every branch.
    """
    return partial(_multiply_rows, (0,) * kind, (0,) * single, (0,) * alike)


@njit(cache=True, nogil=True, _nrt=False)
def _multiply_rows(  # type: ignore[no-untyped-def]
    kind, single, alike, packed, f, places, shifts, table, spare, sums, x, units, first, last, out
):
    """`_rows` by constants that are lengths of tuples.

    Lengths belong to a tuple's type, so that each has a compiled function of its own. Constants
    of an enclosing function would do too, but of two processes that fill numba's cache at once
    one may leave its code under the other's constants; a type is checked when it is called.
    """
    _rows(
        len(kind), len(single) == 1, len(alike) == 1,
        packed, f, places, shifts, table, spare, sums, x, units, first, last, out,
    )  # fmt: skip
