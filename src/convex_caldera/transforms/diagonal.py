"""Diagonals on both sides: what fine-tuning makes of signs and of row magnitudes.

    A = diag(a),   B = diag(1 / b),    W = diag(b) W' diag(a),    H' = diag(a) H diag(a).

Outside a randomized Hadamard it turns the stored signs s into the real vectors s * a and s * b
(RHT fine-tuning); the output side alone is the merged DoRA ratio of magnitude and norm. Entries
may have either sign but not be zero. `fit` returns ones: tuning starts from what it finds, and
only then do the entries leave 1.

B is not orthogonal, unlike that of all other transforms, so the two-sided loss is preserved
(O' = diag(b) O diag(b)) while the one-sided loss holds with b = 1 only; a transform for layers
that are finished, not for recipes.

Sources: QuIP#, arXiv 2402.04396, section 5 (tuned sign vectors); CALDERA, arXiv 2405.18886
("RHT fine-tuning"); DoRA, arXiv 2402.09353. Differs: kept beside the sign bits, in 16 bits, and
DoRA's norm is divided out when it is stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from convex_caldera.core.hessian import Hessian
from convex_caldera.errors import FormatError, RecipeError
from convex_caldera.transforms.stored import Layout, check_shape, check_stored


@dataclass(frozen=True)
class Diagonal:
    """Scale the channels of the inputs, of the outputs, or of both.

    Raises:
        RecipeError: neither side is wanted.
    """

    kind: ClassVar[str] = "diagonal"
    inputs: bool = True
    outputs: bool = True

    def __post_init__(self) -> None:
        if not (self.inputs or self.outputs):
            raise RecipeError("diagonal: scale inputs, outputs or both; leave it out for neither")

    def fit(
        self, W: Tensor, hessian: Hessian, *, seed: int, layer: str, site: str
    ) -> FittedDiagonal:
        """Ones, which change nothing; only the shape of W (m, n) is looked at."""
        del hessian, seed, layer, site
        m, n = W.shape
        of_inputs = torch.ones(n, dtype=torch.float16) if self.inputs else None
        of_outputs = torch.ones(m, dtype=torch.float16) if self.outputs else None
        return FittedDiagonal(self, (m, n), of_inputs, of_outputs)

    def layout(self, shape: tuple[int, int]) -> Layout:
        """One float16 a channel of each scaled side."""
        sides = {
            "input_diagonal": (shape[1], self.inputs),
            "output_diagonal": (shape[0], self.outputs),
        }
        return {name: (torch.float16, (size,)) for name, (size, wanted) in sides.items() if wanted}

    def restore(self, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> FittedDiagonal:
        """Rebuild from the stored entries; FormatError if one is zero or not finite."""
        check_stored(self.kind, tensors, self.layout(shape))
        for name, values in tensors.items():
            bad = ~torch.isfinite(values) | (values == 0)
            if bad.any():
                i = int(bad.nonzero()[0])
                raise FormatError(f"diagonal transform: {name}[{i}] is {values[i].item()}")
        sides = (tensors.get("input_diagonal"), tensors.get("output_diagonal"))
        return FittedDiagonal(self, shape, *sides)


@dataclass(frozen=True, eq=False)
class FittedDiagonal:
    """Entries a (n,) and b (m,) in float16, as stored; each method is a multiplication an entry."""

    transform: Diagonal
    shape: tuple[int, int]
    input_diagonal: Tensor | None
    output_diagonal: Tensor | None

    def apply(self, W: Tensor) -> Tensor:
        """diag(1 / b) W diag(1 / a)."""
        check_shape(self.transform.kind, W.shape, self.shape)
        if self.input_diagonal is not None:
            W = W / self.input_diagonal.to(W)
        if self.output_diagonal is not None:
            W = W / self.output_diagonal.to(W)[:, None]
        return W

    def invert(self, W: Tensor) -> Tensor:
        """diag(b) W diag(a)."""
        check_shape(self.transform.kind, W.shape, self.shape)
        return self.outputs(self.inputs(W).T).T

    def apply_hessian(self, hessian: Hessian) -> Hessian:
        """diag(a) H diag(a), made once per H and a; statistics are dropped but E|x_j|, which

        scales along.
        """
        check_shape(self.transform.kind, (len(hessian),), self.shape[1:])
        return _scaled(hessian, self.input_diagonal)

    def apply_output(self, output: Hessian) -> Hessian:
        """diag(b) O diag(b), likewise."""
        check_shape(self.transform.kind, (len(output),), self.shape[:1])
        return _scaled(output, self.output_diagonal)

    def inputs(self, x: Tensor) -> Tensor:
        """a * x along the last axis (..., n)."""
        return x if self.input_diagonal is None else x * self.input_diagonal.to(x)

    def outputs(self, y: Tensor) -> Tensor:
        """b * y along the last axis (..., m)."""
        return y if self.output_diagonal is None else y * self.output_diagonal.to(y)

    def tensors(self) -> dict[str, Tensor]:
        """{"input_diagonal": (n,), "output_diagonal": (m,)}, float16, of the scaled sides."""
        sides = {"input_diagonal": self.input_diagonal, "output_diagonal": self.output_diagonal}
        return {name: values for name, values in sides.items() if values is not None}


def _scaled(hessian: Hessian, entries: Tensor | None) -> Hessian:
    if entries is None:
        return hessian

    def make() -> Hessian:
        d = entries.to(hessian.matrix)
        statistics = {
            name: value * d.abs().to(value)
            for name, value in hessian.statistics.items()
            if name == "mean_abs"  # the only one known to be proportional to |x|
        }
        return Hessian(hessian.matrix * d[:, None] * d, hessian.damping, hessian.name, statistics)

    scaled: Hessian = hessian.memo(("diagonal", entries.cpu().numpy().tobytes()), make)
    return scaled
