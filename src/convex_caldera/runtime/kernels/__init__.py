"""One table from (kind of quantizer, device) to the kernel that multiplies by coded matrices.

A kernel is a pair of functions, y = Q x and its transpose, on packed codes. `reference` works
for everything everywhere and is the oracle of all others: tests go through `TABLE`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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

TABLE: dict[tuple[str, str], Kernel] = {}


def kernel_for(fitted: FittedQuantizer, device_type: str) -> Kernel:
    """The fastest kernel for a quantizer on a kind of device ("cpu", "cuda")."""
    return TABLE.get((fitted.quantizer.kind, device_type), REFERENCE)
