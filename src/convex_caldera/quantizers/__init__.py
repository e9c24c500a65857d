"""Quantizers: one file is one set of reproduction points; `TABLE` finds them by kind."""

from __future__ import annotations

from convex_caldera.core.protocols import Quantizer
from convex_caldera.quantizers.e8p import E8P
from convex_caldera.quantizers.minifloat import Minifloat
from convex_caldera.quantizers.mxint import MXInt
from convex_caldera.quantizers.normal_float import NormalFloat
from convex_caldera.quantizers.trellis import Trellis
from convex_caldera.quantizers.uniform import Uniform

TABLE: dict[str, type[Quantizer]] = {
    "e8p": E8P,
    "minifloat": Minifloat,
    "mxint": MXInt,
    "normal_float": NormalFloat,
    "trellis": Trellis,
    "uniform": Uniform,
}

__all__ = ["E8P", "TABLE", "MXInt", "Minifloat", "NormalFloat", "Trellis", "Uniform"]
