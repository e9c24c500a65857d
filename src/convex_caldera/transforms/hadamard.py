"""Randomized Hadamard transform: random signs, then a fixed rotation with flat entries.

    A = T_n diag(s_in)     inputs,       B = T_m diag(s_out)     outputs,
    W' = B W A^T,          H' = A H A^T,

both orthogonal. Outliers of W and of the activations spread over all entries, so that one scale
fits the whole matrix. T is the rule "hadamard-v1" of linalg.hadamard, defined for every width;
only the signs are stored, one bit each.

Input signs depend on (seed, site), so layers that read the same input share A, its transformed
Hessian and, at run time, the rotated activations; output signs depend on (seed, layer).

After a rotation no channel is dead: a fit that treats dead channels apart must ask the original
Hessian. Statistics of single channels do not carry over and are dropped.

Source: QuIP#, arXiv 2402.04396, section 3. Differs: any width, signs in bits, inputs or outputs
alone if wanted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from convex_caldera.core.hessian import Hessian
from convex_caldera.core.seeds import random_signs
from convex_caldera.errors import FormatError, RecipeError
from convex_caldera.linalg.hadamard import rotate
from convex_caldera.transforms.stored import check_fields, check_shape, check_vector

# Negative diagonal entries of A H A^T up to this share of the greatest are rounding of zeros.
ROUNDING = 1e-12


@dataclass(frozen=True)
class RandomizedHadamard:
    """Rotate the input side, the output side, or both.

    Raises:
        RecipeError: neither side is wanted.
    """

    kind: ClassVar[str] = "hadamard"
    inputs: bool = True
    outputs: bool = True

    def __post_init__(self) -> None:
        if not (self.inputs or self.outputs):
            raise RecipeError("hadamard: rotate inputs, outputs or both; leave it out for neither")

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the stored tensors."""
        sides = (("input_signs", self.inputs), ("output_signs", self.outputs))
        return tuple(name for name, wanted in sides if wanted)

    def fit(
        self, W: Tensor, hessian: Hessian, *, seed: int, layer: str, site: str
    ) -> FittedHadamard:
        """Draw the signs for W (m, n); only its shape and device are looked at."""
        del hessian
        m, n = W.shape
        of_inputs = random_signs(n, seed, site, "input_signs") if self.inputs else None
        of_outputs = random_signs(m, seed, layer, "output_signs") if self.outputs else None
        return FittedHadamard(self, (m, n), of_inputs, of_outputs)

    def restore(self, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> FittedHadamard:
        """Rebuild from the stored bits; raises FormatError if they do not fit the shape."""
        check_fields(self.kind, tensors, self.fields)
        sizes = {"input_signs": shape[1], "output_signs": shape[0]}
        signs = {name: unpack_signs(name, tensors[name], sizes[name]) for name in self.fields}
        return FittedHadamard(self, shape, signs.get("input_signs"), signs.get("output_signs"))


@dataclass(frozen=True, eq=False)
class FittedHadamard:
    """The rotation with its signs, +-1 in float32: (n,) and (m,), or None for a side left alone.

    Every method is one pass of `rotate` a side: 2 n (base order + Sylvester blocks) flops a
    vector; dtypes are kept, and signs follow the argument to its device.
    """

    transform: RandomizedHadamard
    shape: tuple[int, int]
    input_signs: Tensor | None
    output_signs: Tensor | None

    def apply(self, W: Tensor) -> Tensor:
        """B W A^T."""
        check_shape(self.transform.kind, W.shape, self.shape)
        return _forward(self.inputs(W).T, self.output_signs).T

    def invert(self, W: Tensor) -> Tensor:
        """B^T W A."""
        check_shape(self.transform.kind, W.shape, self.shape)
        return self.outputs(_backward(W, self.input_signs).T).T

    def apply_hessian(self, hessian: Hessian) -> Hessian:
        """A H A^T, made once per H and signs; damping and name stay, statistics are dropped."""
        check_shape(self.transform.kind, (len(hessian),), self.shape[1:])
        if self.input_signs is None:
            return hessian
        key = (self.transform.kind, pack_signs(self.input_signs).numpy().tobytes())
        rotated: Hessian = hessian.memo(key, lambda: self._rotate_hessian(hessian))
        return rotated

    def _rotate_hessian(self, hessian: Hessian) -> Hessian:
        H = self.inputs(self.inputs(hessian.matrix).T)
        diagonal = H.diagonal()
        diagonal[(diagonal < 0) & (diagonal > -ROUNDING * diagonal.max())] = 0.0
        return Hessian(H, hessian.damping, hessian.name)

    def inputs(self, x: Tensor) -> Tensor:
        """A x along the last axis (..., n)."""
        return _forward(x, self.input_signs)

    def outputs(self, y: Tensor) -> Tensor:
        """B^T y along the last axis (..., m)."""
        return _backward(y, self.output_signs)

    def tensors(self) -> dict[str, Tensor]:
        """The signs as bits, see `pack_signs`."""
        sides = {"input_signs": self.input_signs, "output_signs": self.output_signs}
        return {name: pack_signs(signs) for name, signs in sides.items() if signs is not None}


def pack_signs(signs: Tensor) -> Tensor:
    """Signs (n,) as uint8 (ceil(n / 8),): channel i is bit i % 8, least significant first, of

    byte i // 8; 1 means -1; bits beyond n are 0.
    """
    bits = torch.zeros(-(-len(signs) // 8) * 8, dtype=torch.uint8)
    bits[: len(signs)] = signs.cpu() < 0
    place = 2 ** torch.arange(8)
    return (bits.reshape(-1, 8) * place).sum(1).to(torch.uint8)


def unpack_signs(name: str, packed: Tensor, size: int) -> Tensor:
    """Inverse of `pack_signs`, float32; raises FormatError on a wrong length or stray bits."""
    check_vector("hadamard", name, packed, -(-size // 8), torch.uint8)
    bits = ((packed.cpu()[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1).flatten()
    if bits[size:].any():
        raise FormatError(f"hadamard transform: {name} has bits set beyond its {size} channels")
    return 1.0 - 2.0 * bits[:size].float()


def _forward(x: Tensor, signs: Tensor | None) -> Tensor:
    return x if signs is None else rotate(x * signs.to(x))


def _backward(x: Tensor, signs: Tensor | None) -> Tensor:
    return x if signs is None else rotate(x, inverse=True) * signs.to(x)
