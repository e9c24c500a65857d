"""All kinds of quantizers and transforms that format version 1 knows."""

from __future__ import annotations

from convex_caldera.certify import (
    decode_columns,
    decode_e8p,
    decode_hadamard,
    decode_minifloat,
    decode_mxint,
    decode_nested,
    decode_normal_float,
    decode_trellis,
    decode_uniform,
)
from convex_caldera.certify.codec import QuantizerFormat, TransformFormat

QUANTIZERS: dict[str, QuantizerFormat] = {
    "double_scale": decode_nested.DOUBLE_SCALE,
    "e8p": decode_e8p.FORMAT,
    "minifloat": decode_minifloat.FORMAT,
    "mxint": decode_mxint.FORMAT,
    "normal_float": decode_normal_float.FORMAT,
    "strip_order": decode_nested.STRIP_ORDER,
    "trellis": decode_trellis.FORMAT,
    "uniform": decode_uniform.FORMAT,
}
TRANSFORMS: dict[str, TransformFormat] = {
    "diagonal": decode_columns.DIAGONAL,
    "hadamard": decode_hadamard.FORMAT,
    "permute": decode_columns.PERMUTE,
    "scale": decode_columns.SCALE,
}
