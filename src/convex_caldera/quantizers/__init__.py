"""Quantizers: one file is one set of reproduction points; `TABLE` finds them by kind."""

from __future__ import annotations

from convex_caldera.core.protocols import Quantizer
from convex_caldera.quantizers.clipped_uniform import ClippedUniform
from convex_caldera.quantizers.double_scale import DoubleScale
from convex_caldera.quantizers.e8p import E8P
from convex_caldera.quantizers.ecsq import ECSQ
from convex_caldera.quantizers.ecvq import ECVQ
from convex_caldera.quantizers.kmeans import KMeans
from convex_caldera.quantizers.lloyd_max import LloydMax
from convex_caldera.quantizers.minifloat import Minifloat
from convex_caldera.quantizers.mxint import MXInt
from convex_caldera.quantizers.neural import Neural
from convex_caldera.quantizers.normal_float import NormalFloat
from convex_caldera.quantizers.strip_order import StripOrder
from convex_caldera.quantizers.trellis import Trellis
from convex_caldera.quantizers.uniform import Uniform

TABLE: dict[str, type[Quantizer]] = {
    "clipped_uniform": ClippedUniform,
    "double_scale": DoubleScale,
    "e8p": E8P,
    "ecsq": ECSQ,
    "ecvq": ECVQ,
    "kmeans": KMeans,
    "lloyd_max": LloydMax,
    "minifloat": Minifloat,
    "mxint": MXInt,
    "neural": Neural,
    "normal_float": NormalFloat,
    "strip_order": StripOrder,
    "trellis": Trellis,
    "uniform": Uniform,
}

__all__ = [
    "E8P",
    "ECSQ",
    "ECVQ",
    "TABLE",
    "ClippedUniform",
    "DoubleScale",
    "KMeans",
    "LloydMax",
    "MXInt",
    "Minifloat",
    "Neural",
    "NormalFloat",
    "StripOrder",
    "Trellis",
    "Uniform",
]
