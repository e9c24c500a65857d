"""Column scaling: channels with large activations get large weights, hence small relative error.

    A = diag(1 / s),    W' = W diag(s),    H' = diag(1 / s) H diag(1 / s),
    s_j = (t_j / mean t)^exponent,         t_j = sqrt(H_jj)  or  E|x_j|.

A grid shared by a group of columns then spends its precision on the channels that matter: with
exponent 1 and t = sqrt(H_jj) all channels weigh the same. Only the input side can be scaled, for
the loss is preserved under orthogonal changes of the outputs alone.

Sources: AWQ, arXiv 2306.00978 (t = E|x_j|, exponent searched); QuIP#, arXiv 2402.04396 (rescaling
by H). Differs: s depends on the input site only, so layers that share an input share s; AWQ's
search over the exponent is left to whoever builds the recipe.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from convex_caldera.core.hessian import Hessian
from convex_caldera.errors import FormatError, RecipeError
from convex_caldera.transforms.stored import Layout, check_shape, check_stored

Statistic = Literal["rms", "mean_abs"]
STATISTICS: tuple[Statistic, ...] = ("rms", "mean_abs")

# Least t_j / mean t taken at its word; quieter and dead channels count as this. The greatest
# possible is n, so every s is a normal float16 for exponents up to 1 and n < 65504.
QUIETEST = 1e-4


@dataclass(frozen=True)
class ColumnScale:
    """Scale input channels by a power of one of their statistics.

    Args:
        exponent: 0 <= exponent <= 1; 0 leaves everything as it is, 1 equalizes the channels.
        statistic: "rms" = sqrt(E[x_j^2]) from H, "mean_abs" = E|x_j| from its statistics.

    Raises:
        RecipeError: exponent out of range or unknown statistic.
    """

    kind: ClassVar[str] = "scale"
    exponent: float = 0.5
    statistic: Statistic = "rms"

    def __post_init__(self) -> None:
        if not 0.0 <= self.exponent <= 1.0:
            raise RecipeError(f"scale: exponent must be in [0, 1], got {self.exponent}")
        if self.statistic not in STATISTICS:
            names = ", ".join(STATISTICS)
            raise RecipeError(f"scale: unknown statistic {self.statistic!r}; one of {names}")

    def fit(self, W: Tensor, hessian: Hessian, *, seed: int, layer: str, site: str) -> FittedScale:
        """Choose s from H; raises RecipeError if the statistic was not collected."""
        del seed, layer
        check_shape(self.kind, (len(hessian),), W.shape[1:])
        t = self._channel_sizes(hessian, site)
        mean = t.mean()
        ratio = t / mean if mean > 0 else torch.ones_like(t)
        scale = ratio.clamp(min=QUIETEST) ** self.exponent
        return FittedScale(self, (W.shape[0], W.shape[1]), scale.half().cpu())

    def _channel_sizes(self, hessian: Hessian, site: str) -> Tensor:
        if self.statistic == "rms":
            return hessian.matrix.diagonal().sqrt()
        if self.statistic not in hessian.statistics:
            raise RecipeError(
                f"scale: {self.statistic!r} was not collected for {site}; calibrate with it or "
                "use statistic 'rms'"
            )
        return hessian.statistics[self.statistic].double()

    def layout(self, shape: tuple[int, int]) -> Layout:
        """One float16 a channel."""
        return {"scale": (torch.float16, (shape[1],))}

    def restore(self, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> FittedScale:
        """Rebuild from the stored scales; raises FormatError if one is not positive, finite."""
        check_stored(self.kind, tensors, self.layout(shape))
        scale = tensors["scale"].cpu()
        bad = ~(torch.isfinite(scale) & (scale > 0))
        if bad.any():
            j = int(bad.nonzero()[0])
            raise FormatError(f"scale transform: scale[{j}] is {scale[j].item()}, must be positive")
        return FittedScale(self, shape, scale)


@dataclass(frozen=True, eq=False)
class FittedScale:
    """Scales s (n,) float16, as stored; each method is one multiplication an entry."""

    transform: ColumnScale
    shape: tuple[int, int]
    scale: Tensor

    def apply(self, W: Tensor) -> Tensor:
        """W diag(s)."""
        check_shape(self.transform.kind, W.shape, self.shape)
        return W * self.scale.to(W)

    def invert(self, W: Tensor) -> Tensor:
        """W diag(1 / s)."""
        check_shape(self.transform.kind, W.shape, self.shape)
        return self.inputs(W)

    def apply_hessian(self, hessian: Hessian) -> Hessian:
        """diag(1 / s) H diag(1 / s), made once per H and s; statistics E|x_j| scale along."""
        check_shape(self.transform.kind, (len(hessian),), self.shape[1:])
        key = (self.transform.kind, self.scale.numpy().tobytes())
        scaled: Hessian = hessian.memo(key, lambda: self._scale_hessian(hessian))
        return scaled

    def _scale_hessian(self, hessian: Hessian) -> Hessian:
        statistics = {
            name: self.inputs(value)
            for name, value in hessian.statistics.items()
            if name == "mean_abs"  # the only one known to be proportional to x
        }
        H = self.inputs(self.inputs(hessian.matrix).T)
        return Hessian(H, hessian.damping, hessian.name, statistics)

    def apply_output(self, output: Hessian) -> Hessian:
        """O itself: B = I."""
        check_shape(self.transform.kind, (len(output),), self.shape[:1])
        return output

    def inputs(self, x: Tensor) -> Tensor:
        """x / s along the last axis (..., n)."""
        return x / self.scale.to(x)

    def outputs(self, y: Tensor) -> Tensor:
        """Nothing to undo: B = I."""
        return y

    def tensors(self) -> dict[str, Tensor]:
        """{"scale": (n,) float16}."""
        return {"scale": self.scale}
