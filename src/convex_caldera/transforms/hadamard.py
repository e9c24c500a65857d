"""Randomised Hadamard on both sides: incoherence processing.

    A = T_n diag(s_in) on inputs,   B = T_m diag(s_out) on outputs,   W' = B W A^T,  H' = A H A^T

with T the orthogonal transform "hadamard-v1" of `linalg.hadamard` and independent signs s. Both
are orthogonal, so the loss is the same in both coordinates, and entries of W' are close to
Gaussian whatever W was. Layers of one input site share s_in, and so H' and its factorizations.

Stored: one bit per sign, least significant bit first, 1 for -1; the last byte padded with zeros.

Source: Tseng et al., QuIP#, arXiv 2402.04396, section 3; any order of T where they need one of
a table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from convex_caldera.core.hessian import Hessian
from convex_caldera.core.seeds import random_signs
from convex_caldera.errors import FormatError
from convex_caldera.linalg.hadamard import rotate

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


@final
@dataclass(frozen=True)
class RandomizedHadamard:
    """Random signs and a Hadamard rotation of the inputs, the outputs, or both."""

    inputs: bool = True
    outputs: bool = True
    kind: ClassVar[str] = "hadamard"

    def fit(
        self, W: Tensor, hessian: Hessian, *, seed: int, layer: str, site: str
    ) -> FittedHadamard:
        """Draw signs: those of the inputs from (seed, site), of the outputs from (seed, layer)."""
        m, n = W.shape
        del hessian
        return FittedHadamard(
            self,
            (m, n),
            random_signs(n, seed, site, "input_signs") if self.inputs else None,
            random_signs(m, seed, layer, "output_signs") if self.outputs else None,
            (self.kind, seed, site),
        )

    def layout(self, shape: tuple[int, int]) -> Layout:
        m, n = shape
        sides = {"input_signs": (self.inputs, n), "output_signs": (self.outputs, m)}
        return {
            name: (torch.uint8, ((size + 7) // 8,)) for name, (used, size) in sides.items() if used
        }

    def restore(self, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> FittedHadamard:
        layout = self.layout(shape)
        found = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
        if found != layout:
            raise FormatError(f"signs of a {shape} layer must be {layout}, got {found}")
        sizes = {"input_signs": shape[1], "output_signs": shape[0]}
        signs = {name: _unpack_signs(t, sizes[name]) for name, t in tensors.items()}
        return FittedHadamard(self, shape, signs.get("input_signs"), signs.get("output_signs"))


@final
@dataclass(frozen=True, eq=False)
class FittedHadamard:
    """The rotation with its signs, float32 +-1; None on a side that is left alone."""

    transform: RandomizedHadamard
    shape: tuple[int, int]
    input_signs: Tensor | None
    output_signs: Tensor | None
    key: tuple[str, int, str] | None = None

    def apply(self, W: Tensor) -> Tensor:
        W = _turn(W, self.input_signs)
        return _turn(W.T, self.output_signs).T.contiguous()

    def invert(self, W: Tensor) -> Tensor:
        W = _turn_back(W, self.input_signs)
        return _turn_back(W.T, self.output_signs).T.contiguous()

    def apply_hessian(self, hessian: Hessian) -> Hessian:
        if self.input_signs is None:
            return hessian
        if self.key is None:
            return self._rotated(hessian)
        return hessian.memo(self.key, lambda: self._rotated(hessian))

    def _rotated(self, hessian: Hessian) -> Hessian:
        turned = _turn(_turn(hessian.matrix, self.input_signs).T, self.input_signs)
        return Hessian(turned, hessian.damping, hessian.name)

    def inputs(self, x: Tensor) -> Tensor:
        return _turn(x, self.input_signs)

    def outputs(self, y: Tensor) -> Tensor:
        return _turn_back(y, self.output_signs)

    def tensors(self) -> dict[str, Tensor]:
        sides = {"input_signs": self.input_signs, "output_signs": self.output_signs}
        return {name: _pack_signs(s) for name, s in sides.items() if s is not None}


def _turn(x: Tensor, signs: Tensor | None) -> Tensor:
    """T (s * x) along the last axis."""
    return x if signs is None else rotate(x * signs.to(x.device, x.dtype))


def _turn_back(x: Tensor, signs: Tensor | None) -> Tensor:
    """s * (T^T x) along the last axis."""
    return x if signs is None else rotate(x, inverse=True) * signs.to(x.device, x.dtype)


def _pack_signs(signs: Tensor) -> Tensor:
    bits = torch.zeros((len(signs) + 7) // 8 * 8, dtype=torch.uint8)
    bits[: len(signs)] = signs.cpu() < 0
    weights = 2 ** torch.arange(8, dtype=torch.uint8)
    return (bits.view(-1, 8) * weights).sum(dim=1, dtype=torch.uint8)


def _unpack_signs(packed: Tensor, size: int) -> Tensor:
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = ((packed[:, None] >> shifts) & 1).flatten()
    if bits[size:].any():
        raise FormatError("the padding after the last sign must be zero")
    return 1.0 - 2.0 * bits[:size].float()
