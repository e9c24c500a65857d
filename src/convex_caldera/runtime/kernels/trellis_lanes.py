"""Sixteen states and levels of a trellis at a time, beside the lanes of `trellis_simd`.

States are windows of one bit stream. Eight consecutive ones lie in one 64-bit word as long as
L + 7 K + 7 <= 64, so that one load, broadcast and shifted by eight amounts, makes them; longer
ones come by fours. Stream bytes are most significant first, hence the byte swap (movbe).
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils, types
from numba.extending import intrinsic

from convex_caldera.quantizers.trellis_simd import LANES, lanes, words

_F32 = ir.VectorType(ir.FloatType(), LANES)
_I32 = ir.VectorType(ir.IntType(32), LANES)
_I64 = ir.IntType(64)
_HALF_BIAS = (127 - 15) << 23  # float32's exponent bias less that of half precision


def _constant(value: int) -> Any:
    return ir.Constant(_I32, [value] * LANES)


def _splat(builder: Any, scalar: Any, count: int) -> Any:
    kind = ir.VectorType(scalar.type, count)
    undefined = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(ir.IntType(32), 0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), count), [0] * count)
    return builder.shuffle_vector(first, undefined, zeros)


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    base = context.make_array(array_type)(context, builder, array).data
    return builder.gep(base, [index])


def _load_swapped(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    at = _pointer(context, builder, array_type, array, index)
    word = builder.load(builder.bitcast(at, _I64.as_pointer()), align=1)
    kind = ir.FunctionType(_I64, [_I64])
    swap = cgutils.get_or_insert_function(builder.module, kind, "llvm.bswap.i64")
    return builder.call(swap, [word])


@intrinsic
def load_swapped(typing: Any, stream: Any, index: Any) -> Any:
    """The 64 bits that begin with byte `index` of a byte array, the first bit on top."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _load_swapped(context, builder, signature.args[0], args[0], args[1])

    return types.uint64(stream, types.intp), generate


def _windows(size: int) -> Any:
    """An intrinsic that reads sixteen windows by groups of `size` lanes."""

    @intrinsic
    def windows(typing: Any, stream: Any, start: Any, firsts: Any, shifts: Any, mask: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            stream, start, firsts, shifts, mask = args
            of, kinds = (lambda value: ir.Constant(_I64, value)), signature.args
            parts = []
            for group in range(LANES // size):
                first = _pointer(context, builder, kinds[2], firsts, of(group))
                bit = builder.add(start, builder.load(first))
                byte, spare = builder.lshr(bit, of(3)), builder.and_(bit, of(7))
                word = _load_swapped(context, builder, kinds[0], stream, byte)
                word = builder.shl(word, spare)
                at = _pointer(context, builder, kinds[3], shifts, of(group * size))
                kind = ir.VectorType(_I64, size)
                by = builder.load(builder.bitcast(at, kind.as_pointer()), align=8)
                moved = builder.lshr(_splat(builder, word, size), by)
                parts.append(builder.trunc(moved, ir.VectorType(ir.IntType(32), size)))
            while len(parts) > 1:
                parts = [_joined(builder, *parts[i : i + 2]) for i in range(0, len(parts), 2)]
            return builder.and_(parts[0], _splat(builder, mask, LANES))

        return words(stream, types.intp, firsts, shifts, types.uint32), generate

    return windows


def _joined(builder: Any, left: Any, right: Any) -> Any:
    count = 2 * left.type.count
    order = ir.Constant(ir.VectorType(ir.IntType(32), count), list(range(count)))
    return builder.shuffle_vector(left, right, order)


# (stream bytes, bit at which the row's first new bit stands, first bit of each group relative to
# it, int64; right shift of each lane, int64; mask of a state) -> the sixteen states
windows_by_eight, windows_by_four = _windows(8), _windows(4)


@intrinsic
def table_levels(typing: Any, word: Any, shift: Any, table: Any) -> Any:
    """table[word >> shift], `table` a float32 array."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x, shift, table = args
        index = builder.lshr(x, _splat(builder, shift, LANES))
        level = ir.Constant(_F32, ir.Undefined)
        for lane in range(LANES):
            number = ir.Constant(ir.IntType(32), lane)
            entry = builder.zext(builder.extract_element(index, number), _I64)
            at = _pointer(context, builder, signature.args[2], table, entry)
            level = builder.insert_element(level, builder.load(at), number)
        return level

    return lanes(words, types.uint32, table), generate


@intrinsic
def byte_sum_levels(typing: Any, word: Any, mean: Any) -> Any:
    """Sum of the four bytes less `mean`, as floats."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x, mean = args
        even = builder.and_(x, _constant(0x00FF00FF))
        odd = builder.and_(builder.lshr(x, _constant(8)), _constant(0x00FF00FF))
        pairs = builder.add(even, odd)
        total = builder.add(pairs, builder.lshr(pairs, _constant(16)))
        total = builder.and_(total, _constant(0xFFFF))
        return builder.sitofp(builder.sub(total, _splat(builder, mean, LANES)), _F32)

    return lanes(words, types.int32), generate


@intrinsic
def half_sum_levels(typing: Any, word: Any) -> Any:
    """Sum of the halves of (word & 0x8FFF8FFF) xor 0x3B603B60 as half-precision numbers.

    The two constants leave exponents between 12 and 15: no zeros, infinities or subnormals.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def widened(half: Any) -> Any:
            sign = builder.shl(builder.and_(half, _constant(0x8000)), _constant(16))
            rest = builder.shl(builder.and_(half, _constant(0x7FFF)), _constant(13))
            bits = builder.or_(sign, builder.add(rest, _constant(_HALF_BIAS)))
            return builder.bitcast(bits, _F32)

        x = builder.xor(builder.and_(args[0], _constant(0x8FFF8FFF)), _constant(0x3B603B60))
        low = builder.and_(x, _constant(0xFFFF))
        return builder.fadd(widened(low), widened(builder.lshr(x, _constant(16))))

    return lanes(words), generate


@intrinsic
def times(typing: Any, value: Any, factor: Any) -> Any:
    """value * factor, the scalar in every lane."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fmul(args[0], _splat(builder, args[1], LANES))

    return lanes(lanes, types.float32), generate


@intrinsic
def multiply_add(typing: Any, left: Any, right: Any, addend: Any) -> Any:
    """left * right + addend, rounded once."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(_F32, [_F32, _F32, _F32])
        name = f"llvm.fma.v{LANES}f32"
        fma = cgutils.get_or_insert_function(builder.module, kind, name)
        return builder.call(fma, args)

    return lanes(lanes, lanes, lanes), generate
