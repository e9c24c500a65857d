"""All kinds of quantizers and transforms that format version 1 knows."""

from __future__ import annotations

from convex_caldera.certify import (
    decode_codebooks,
    decode_columns,
    decode_e8p,
    decode_hadamard,
    decode_minifloat,
    decode_mxint,
    decode_nested,
    decode_neural,
    decode_normal_float,
    decode_trellis,
    decode_uniform,
)
from convex_caldera.certify.codec import QuantizerFormat, TransformFormat

PLAIN: dict[str, QuantizerFormat] = {
    "clipped_uniform": decode_codebooks.CLIPPED_UNIFORM,
    "e8p": decode_e8p.FORMAT,
    "ecsq": decode_codebooks.ECSQ,
    "ecvq": decode_codebooks.ECVQ,
    "kmeans": decode_codebooks.KMEANS,
    "lloyd_max": decode_codebooks.LLOYD_MAX,
    "minifloat": decode_minifloat.FORMAT,
    "mxint": decode_mxint.FORMAT,
    "neural": decode_neural.FORMAT,
    "normal_float": decode_normal_float.FORMAT,
    "trellis": decode_trellis.FORMAT,
    "uniform": decode_uniform.FORMAT,
}
SCALED = PLAIN | {"double_scale": decode_nested.double_scale(PLAIN)}
QUANTIZERS = SCALED | {"strip_order": decode_nested.strip_order(SCALED)}
TRANSFORMS: dict[str, TransformFormat] = {
    "diagonal": decode_columns.DIAGONAL,
    "hadamard": decode_hadamard.FORMAT,
    "permute": decode_columns.PERMUTE,
    "scale": decode_columns.SCALE,
}
