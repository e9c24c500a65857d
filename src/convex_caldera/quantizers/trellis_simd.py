"""Sixteen 32-bit lanes as one value inside numba kernels: the only vectors the encoders need.

A trellis step has no room for a vectorizer: its inner loop over tiles is sixteen long and its
arrays may alias. These intrinsics write the vector instructions of LLVM directly; LLVM lowers
them to whatever the machine has (one AVX-512 register, two AVX2, four NEON or SSE).

Arithmetic is IEEE single precision with an explicit fused multiply-add, so every machine
computes the same costs and chooses the same codes.

Indices count elements of flat C-contiguous arrays and are not checked.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils, types
from numba.extending import intrinsic, models, register_model

LANES = 16

_F32 = ir.VectorType(ir.FloatType(), LANES)
_I32 = ir.VectorType(ir.IntType(32), LANES)
_I8 = ir.VectorType(ir.IntType(8), LANES)


class LanesType(types.Type):
    """Numba's name for sixteen floats held in registers."""

    def __init__(self) -> None:
        super().__init__(name="Float32Lanes16")


class WordsType(types.Type):
    """Numba's name for sixteen unsigned words held in registers."""

    def __init__(self) -> None:
        super().__init__(name="Word32Lanes16")


lanes, words = LanesType(), WordsType()


@register_model(LanesType)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, fe_type: Any) -> None:
        super().__init__(manager, fe_type, _F32)


@register_model(WordsType)
class _WordsModel(models.PrimitiveModel):
    def __init__(self, manager: Any, fe_type: Any) -> None:
        super().__init__(manager, fe_type, _I32)


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    base = context.make_array(array_type)(context, builder, array).data
    return builder.gep(base, [index])


def _splat(builder: Any, scalar: Any, vector_type: Any) -> Any:
    undefined = ir.Constant(vector_type, ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(_I32, [0] * LANES))


def _fma(builder: Any) -> Any:
    kind = ir.FunctionType(_F32, [_F32, _F32, _F32])
    return cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{LANES}f32")


@intrinsic
def load(typing: Any, array: Any, index: Any) -> Any:
    """array[index : index + 16] of a float32 array."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        at = _pointer(context, builder, signature.args[0], args[0], args[1])
        return builder.load(builder.bitcast(at, _F32.as_pointer()), align=4)

    return lanes(array, types.intp), generate


@intrinsic
def store(typing: Any, array: Any, index: Any, value: Any) -> Any:
    """array[index : index + 16] = value, float32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        at = _pointer(context, builder, signature.args[0], args[0], args[1])
        builder.store(args[2], builder.bitcast(at, _F32.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, lanes), generate


@intrinsic
def store_tags(typing: Any, array: Any, index: Any, value: Any, low: Any) -> Any:
    """array[index : index + 16] = low bits of the float patterns, masked by `low`, uint8."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        at = _pointer(context, builder, signature.args[0], args[0], args[1])
        tags = builder.trunc(builder.bitcast(args[2], _I32), _I8)
        mask = _splat(builder, builder.trunc(args[3], ir.IntType(8)), _I8)
        builder.store(builder.and_(tags, mask), builder.bitcast(at, _I8.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(array, types.intp, lanes, types.int32), generate


@intrinsic
def tagged_cost(typing: Any, level: Any, target: Any, cost: Any, tag: Any, keep: Any) -> Any:
    """(level - target)^2 + cost, the float's low bits (where `keep` is 0) replaced by `tag`.

    Costs are not negative, so floats order as their bit patterns do: a minimum over tagged
    costs carries the winner's name with it and needs no second comparison.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        level, target, cost, tag, keep = args
        difference = builder.fsub(_splat(builder, level, _F32), target)
        total = builder.call(_fma(builder), [difference, difference, cost])
        total = builder.bitcast(total, _I32)
        kept = builder.and_(total, _splat(builder, keep, _I32))
        return builder.bitcast(builder.or_(kept, _splat(builder, tag, _I32)), _F32)

    return lanes(types.float32, lanes, lanes, types.int32, types.int32), generate


@intrinsic
def minimum(typing: Any, left: Any, right: Any) -> Any:
    """Lane by lane the smaller one; `left` where they are equal."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        left, right = args
        return builder.select(builder.fcmp_ordered("<", right, left), right, left)

    return lanes(lanes, lanes), generate


@intrinsic
def subtract(typing: Any, left: Any, right: Any) -> Any:
    """left - right."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fsub(args[0], args[1])

    return lanes(lanes, lanes), generate


# --- words: unsigned 32-bit lanes, arithmetic modulo 2^32 --------------------------------------


@intrinsic
def load_words(typing: Any, array: Any, index: Any) -> Any:
    """array[index : index + 16] of a uint32 array."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        at = _pointer(context, builder, signature.args[0], args[0], args[1])
        return builder.load(builder.bitcast(at, _I32.as_pointer()), align=4)

    return words(array, types.intp), generate


@intrinsic
def count_up(typing: Any, first: Any) -> Any:
    """first, first + 1, .. first + 15."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.add(_splat(builder, args[0], _I32), ir.Constant(_I32, list(range(LANES))))

    return words(types.uint32), generate


def _word_operation(name: str) -> Any:
    """An intrinsic: words `name` a scalar uint32, the scalar in every lane."""

    @intrinsic
    def operation(typing: Any, value: Any, scalar: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return getattr(builder, name)(args[0], _splat(builder, args[1], _I32))

        return words(words, types.uint32), generate

    return operation


add_word, multiply_word = _word_operation("add"), _word_operation("mul")
shift_left, shift_right = _word_operation("shl"), _word_operation("lshr")
mask_word = _word_operation("and_")


@intrinsic
def exclusive_or(typing: Any, left: Any, right: Any) -> Any:
    """left xor right, words."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.xor(args[0], args[1])

    return words(words, words), generate


@intrinsic
def byte_sum_cost(typing: Any, word: Any, unit: Any, target: Any, cost: Any) -> Any:
    """(unit * sum of the bytes of `word` - target)^2 + cost."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x, unit, target, cost = args

        def constant(value: int) -> Any:
            return ir.Constant(_I32, [value] * LANES)

        even = builder.and_(x, constant(0x00FF00FF))
        pairs = builder.add(even, builder.and_(builder.lshr(x, constant(8)), constant(0x00FF00FF)))
        total = builder.and_(
            builder.add(pairs, builder.lshr(pairs, constant(16))), constant(0xFFFF)
        )
        level = builder.sitofp(total, _F32)
        fma = _fma(builder)
        minus = builder.fsub(ir.Constant(_F32, [-0.0] * LANES), _splat(builder, target, _F32))
        difference = builder.call(fma, [level, _splat(builder, unit, _F32), minus])
        return builder.call(fma, [difference, difference, cost])

    return lanes(words, types.float32, types.float32, lanes), generate


@intrinsic
def table_cost(typing: Any, word: Any, shift: Any, table: Any, target: Any, cost: Any) -> Any:
    """(table[word >> shift] - target)^2 + cost, `table` a float32 array."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x, shift, table, target, cost = args
        index = builder.lshr(x, _splat(builder, shift, _I32))
        level = ir.Constant(_F32, ir.Undefined)
        for lane in range(LANES):
            number = ir.Constant(ir.IntType(32), lane)
            entry = builder.zext(builder.extract_element(index, number), ir.IntType(64))
            at = _pointer(context, builder, signature.args[2], table, entry)
            level = builder.insert_element(level, builder.load(at), number)
        difference = builder.fsub(level, _splat(builder, target, _F32))
        return builder.call(_fma(builder), [difference, difference, cost])

    return lanes(words, types.uint32, table, types.float32, lanes), generate


@intrinsic
def append_below(
    typing: Any,
    value: Any,
    limit: Any,
    key: Any,
    origin: Any,
    values: Any,
    keys: Any,
    origins: Any,
    at: Any,
) -> Any:
    """Append the lanes whose value is below `limit` to three arrays at index `at`.

    Returns the index after them. The arrays need room for sixteen entries.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value, limit, key, origin, *arrays, at = args
        mask = builder.fcmp_ordered("<", value, _splat(builder, limit, _F32))
        for entry, array, array_type in zip(
            (value, key, origin), arrays, signature.args[4:7], strict=True
        ):
            target = _pointer(context, builder, array_type, array, at)
            suffix = "f32" if entry is value else "i32"
            kind = ir.FunctionType(ir.VoidType(), [entry.type, target.type, mask.type])
            name = f"llvm.masked.compressstore.v{LANES}{suffix}"
            store_kept = cgutils.get_or_insert_function(builder.module, kind, name)
            builder.call(store_kept, [entry, target, mask])
        count = builder.ctpop(builder.bitcast(mask, ir.IntType(LANES)))
        return builder.add(at, builder.zext(count, at.type))

    signature = types.intp(lanes, types.float32, words, words, values, keys, origins, types.intp)
    return signature, generate
