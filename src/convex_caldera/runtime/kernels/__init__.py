"""One table from (kind of quantizer, device) to the kernel that multiplies by coded matrices.

A kernel is a pair of functions, y = Q x and its transpose, on packed codes. `reference` works
for everything everywhere and is the oracle of all others: tests go through `TABLE`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module

from torch import Tensor

from convex_caldera.core.protocols import FittedQuantizer
from convex_caldera.runtime.kernels import reference

# (fitted, packed codes, x) -> product; x is float32 with one vector per row
Product = Callable[[FittedQuantizer, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Kernel:
    """`forward` maps (tokens, n) to (tokens, m) by Q, `transposed` (tokens, m) to (tokens, n)."""

    name: str
    forward: Product
    transposed: Product


REFERENCE = Kernel("reference", reference.multiply, reference.multiply_transposed)

# (kind, device) -> module of this room that has `multiply` and `multiply_transposed`; modules
# are imported when first used, since compiling kernels takes a while.
TABLE: dict[tuple[str, str], str] = {
    ("e8p", "cpu"): "lattice_cpu",
    ("lloyd_max", "cpu"): "scalar_cpu",
    ("minifloat", "cpu"): "scalar_cpu",
    ("mxint", "cpu"): "scalar_cpu",
    ("normal_float", "cpu"): "scalar_cpu",
    ("trellis", "cpu"): "trellis_cpu",
    ("uniform", "cpu"): "scalar_cpu",
}


def kernel_for(fitted: FittedQuantizer, device_type: str) -> Kernel:
    """The fastest kernel for a quantizer on a kind of device ("cpu", "cuda")."""
    name = TABLE.get((fitted.quantizer.kind, device_type))
    return REFERENCE if name is None else named_kernel(name)


@cache
def named_kernel(name: str) -> Kernel:
    """The kernel of one module of this room."""
    module = import_module(f"{__name__}.{name}")
    return Kernel(name, module.multiply, module.multiply_transposed)
