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
from convex_caldera.transforms.stored import Layout, check_shape, check_stored

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

    def fit(
        self, W: Tensor, hessian: Hessian, *, seed: int, layer: str, site: str
    ) -> FittedHadamard:
        """Draw the signs for W (m, n); only its shape and device are looked at."""
        del hessian
        m, n = W.shape
        of_inputs = random_signs(n, seed, site, "input_signs") if self.inputs else None
        of_outputs = random_signs(m, seed, layer, "output_signs") if self.outputs else None
        return FittedHadamard(self, (m, n), of_inputs, of_outputs)

    def layout(self, shape: tuple[int, int]) -> Layout:
        """One bit a channel of each rotated side."""
        sizes = {"input_signs": (shape[1], self.inputs), "output_signs": (shape[0], self.outputs)}
        return {
            name: (torch.uint8, (packed_size(size),))
            for name, (size, wanted) in sizes.items()
            if wanted
        }

    def restore(self, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> FittedHadamard:
        """Rebuild from the stored bits; raises FormatError if they do not fit the shape."""
        check_stored(self.kind, tensors, self.layout(shape))
        m, n = shape
        of_inputs = unpack_signs(tensors["input_signs"], n) if self.inputs else None
        of_outputs = unpack_signs(tensors["output_signs"], m) if self.outputs else None
        return FittedHadamard(self, (m, n), of_inputs, of_outputs)


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
        return _rotate_hessian(hessian, self.input_signs)

    def apply_output(self, output: Hessian) -> Hessian:
        """B O B^T, likewise."""
        check_shape(self.transform.kind, (len(output),), self.shape[:1])
        return _rotate_hessian(output, self.output_signs)

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


def packed_size(size: int) -> int:
    """Bytes of `size` signs."""
    return (size + 7) // 8


def pack_signs(signs: Tensor) -> Tensor:
    """Signs (n,) as uint8 (ceil(n / 8),), a set bit for -1.

    Channel i is bit i % 8, counted from the least significant, of byte i // 8. Bits beyond n
    are 0.
    """
    bits = torch.zeros(8 * packed_size(len(signs)), dtype=torch.uint8)
    bits[: len(signs)] = signs.cpu() < 0
    return (bits.reshape(-1, 8) << torch.arange(8, dtype=torch.uint8)).sum(1).to(torch.uint8)


def unpack_signs(packed: Tensor, size: int) -> Tensor:
    """Inverse of `pack_signs`, float32 (size,); raises FormatError if bits beyond it are set."""
    bits = ((packed.cpu()[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1).flatten()
    if bits[size:].any():
        raise FormatError(f"hadamard transform: signs set beyond the {size} channels; damaged file")
    return 1.0 - 2.0 * bits[:size].float()


def _rotate_hessian(hessian: Hessian, signs: Tensor | None) -> Hessian:
    """R H R^T for R = T diag(signs), once per H and signs; the same object if there are none."""
    if signs is None:
        return hessian

    def make() -> Hessian:
        H = _forward(_forward(hessian.matrix, signs).T, signs)
        diagonal = H.diagonal()
        diagonal[(diagonal < 0) & (diagonal > -ROUNDING * diagonal.max())] = 0.0
        return Hessian(H, hessian.damping, hessian.name)

    rotated: Hessian = hessian.memo(("hadamard", pack_signs(signs).numpy().tobytes()), make)
    return rotated


def _forward(x: Tensor, signs: Tensor | None) -> Tensor:
    return x if signs is None else rotate(x * signs.to(x))


def _backward(x: Tensor, signs: Tensor | None) -> Tensor:
    return x if signs is None else rotate(x, inverse=True) * signs.to(x)
