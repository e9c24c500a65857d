"""Sixteen float32 lanes as one value inside numba kernels: the only vectors the encoders need.

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


lanes = LanesType()


@register_model(LanesType)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, fe_type: Any) -> None:
        super().__init__(manager, fe_type, _F32)


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    base = context.make_array(array_type)(context, builder, array).data
    return builder.gep(base, [index])


def _splat(builder: Any, scalar: Any, vector_type: Any) -> Any:
    undefined = ir.Constant(vector_type, ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(_I32, [0] * LANES))


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
        kind = ir.FunctionType(_F32, [_F32, _F32, _F32])
        fma = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{LANES}f32")
        total = builder.bitcast(builder.call(fma, [difference, difference, cost]), _I32)
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
