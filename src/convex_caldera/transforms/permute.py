"""Activation order: input channels sorted by descending H_jj.

    A = P,  (P x)_i = x_order[i],    W' = W[:, order],    H' = H[order][:, order].

Rounding with feedback treats columns from left to right, and what is rounded last has nobody to
pass its error on to; with this order that is the column which matters least. Groups of columns
that share a scale are formed in the new order.

Source: "act-order" of GPTQ, arXiv 2210.17323 (in its code, not the paper). Differs: stored as
the order itself, two bytes a channel, and undone on the activations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from convex_caldera.core.hessian import Hessian
from convex_caldera.errors import FormatError
from convex_caldera.transforms.stored import Layout, check_shape, check_stored


@dataclass(frozen=True)
class ActOrder:
    """Sort input channels by descending H_jj; channels that tie keep their order."""

    kind: ClassVar[str] = "permute"

    def fit(self, W: Tensor, hessian: Hessian, *, seed: int, layer: str, site: str) -> FittedOrder:
        """Sort; W gives the shape only, and nothing is random."""
        del seed, layer, site
        check_shape(self.kind, (len(hessian),), W.shape[1:])
        order = torch.argsort(hessian.matrix.diagonal(), descending=True, stable=True)
        return FittedOrder(self, (W.shape[0], W.shape[1]), order.cpu())

    def layout(self, shape: tuple[int, int]) -> Layout:
        """One index a channel: uint16 for up to 65536 channels, uint32 beyond."""
        return {"order": (torch.uint16 if shape[1] <= 2**16 else torch.uint32, (shape[1],))}

    def restore(self, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> FittedOrder:
        """Rebuild from the stored order; raises FormatError if it is not a permutation."""
        check_stored(self.kind, tensors, self.layout(shape))
        order = tensors["order"].cpu().long()
        if not torch.equal(order.sort().values, torch.arange(shape[1])):
            raise FormatError(f"permute transform: order does not list each of {shape[1]} once")
        return FittedOrder(self, shape, order)


@dataclass(frozen=True, eq=False)
class FittedOrder:
    """The order (n,) as int64; each method is one gather."""

    transform: ActOrder
    shape: tuple[int, int]
    order: Tensor

    def apply(self, W: Tensor) -> Tensor:
        """W[:, order]."""
        check_shape(self.transform.kind, W.shape, self.shape)
        return self.inputs(W)

    def invert(self, W: Tensor) -> Tensor:
        """Columns back in their places."""
        check_shape(self.transform.kind, W.shape, self.shape)
        return W[:, torch.argsort(self.order).to(W.device)]

    def apply_hessian(self, hessian: Hessian) -> Hessian:
        """H[order][:, order], made once per H and order; statistics are permuted along."""
        check_shape(self.transform.kind, (len(hessian),), self.shape[1:])
        key = (self.transform.kind, self.order.numpy().tobytes())
        sorted_: Hessian = hessian.memo(key, lambda: self._sort_hessian(hessian))
        return sorted_

    def _sort_hessian(self, hessian: Hessian) -> Hessian:
        statistics = {name: self.inputs(value) for name, value in hessian.statistics.items()}
        H = self.inputs(self.inputs(hessian.matrix).T)
        return Hessian(H, hessian.damping, hessian.name, statistics)

    def apply_output(self, output: Hessian) -> Hessian:
        """O itself: B = I."""
        check_shape(self.transform.kind, (len(output),), self.shape[:1])
        return output

    def inputs(self, x: Tensor) -> Tensor:
        """x[..., order]."""
        return x[..., self.order.to(x.device)]

    def outputs(self, y: Tensor) -> Tensor:
        """Nothing to undo: B = I."""
        return y

    def tensors(self) -> dict[str, Tensor]:
        """{"order": (n,)} in the least unsigned type that holds n - 1."""
        dtype, _ = self.transform.layout(self.shape)["order"]
        return {"order": self.order.to(dtype)}
