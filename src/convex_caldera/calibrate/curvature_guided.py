"""Grouped Fisher curvature: for every group of output channels an input covariance of its own.

With tokens taken as independent and channels of one group taken as alike, the Fisher matrix of
a layer is block diagonal over its output channels, and

    KL per token  ~  sum_k tr(E_k H_k E_k^T),
    H_k = 1/2 E_t[ (mean_{j in group k} g_tj^2) x_t x_t^T ],

x_t what the layer reads at token t, g_t the gradient of the sequence's log-likelihood with
respect to what it writes there (labels drawn from the model itself), E_k the rows of the error
that belong to group k. One group is the input covariance weighted by the squared gradient.

Source: Kim et al., GuidedQuant, arXiv 2505.07004. Differs: groups are runs of neighbouring
channels that end at multiples of 16, so that trellis tiles do not straddle them, and the unit is
nats; narrow layers have one group, for the scales that rows then need would cost too much.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from convex_caldera.calibrate.curvature import token_gradients
from convex_caldera.core.hessian import Hessian
from convex_caldera.core.problem import row_slices
from convex_caldera.errors import NumericalError, RecipeError
from convex_caldera.linalg.finite import all_finite
from convex_caldera.recipes.guided import group_count


@dataclass(frozen=True, eq=False)
class GuidedCurvature:
    """H_k (n, n) in nats of every row group of a layer with `rows` output channels."""

    groups: tuple[Tensor, ...]
    rows: int
    sequences: int

    @property
    def energy(self) -> float:
        """Mean diagonal over all groups; 0 if no gradient reached the layer."""
        return sum(float(H.diagonal().mean()) for H in self.groups) / len(self.groups)

    def hessians(self, name: str, damping: float = 0.01) -> tuple[Hessian, ...]:
        """One Hessian a group, as the fits take them."""
        return tuple(
            Hessian(H, damping, f"{name} (row group {k})") for k, H in enumerate(self.groups)
        )


def guided_curvature(
    model: nn.Module,
    tokens: Tensor,
    layers: Collection[str],
    *,
    seed: int,
    groups: int | None = None,
    draws: int = 1,
    batch_size: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, GuidedCurvature]:
    """Grouped curvature of the named linear layers.

    Args:
        model: a causal language model with all its weights, float32.
        tokens: (sequences, T) token ids.
        layers: full names of nn.Linear modules.
        seed: of the labels drawn.
        groups: of output channels in each layer; fewer where a layer has too few rows. Without
            it `recipes.guided.group_count` decides by the layer's width.
        draws: of labels for each sequence, as in `sequence_curvature`.
        progress: called with (sequences done, in all).

    Raises:
        NumericalError: a gradient is NaN or infinite; names the layer.
        RecipeError: fewer than one group.

    Cost: one forward pass, and a backward pass and T n^2 multiply-adds a group, layer and draw;
    memory n^2 float32 a group and layer beside the model.
    """
    if groups is not None and groups < 1:
        raise RecipeError(f"guided curvature needs at least one group of rows, got {groups}")
    shapes = {name: model.get_submodule(name).weight.shape for name in layers}
    sums = {name: _Sums(s, groups or group_count((s[0], s[1]))) for name, s in shapes.items()}
    for name, x, dy in token_gradients(model, tokens, layers, seed, batch_size, progress, draws):
        sums[name].add(x, dy, name)
    count, length = tokens.shape
    return {name: layer.finish(draws * count, length) for name, layer in sums.items()}


class _Sums:
    """Weighted second moments of one layer's input, a row group each."""

    def __init__(self, shape: torch.Size, groups: int):
        m, n = shape
        self.rows = m
        self.slices = row_slices(m, groups)
        self.moments = [torch.zeros(n, n) for _ in self.slices]

    def add(self, x: Tensor, dy: Tensor, name: str) -> None:
        if not (all_finite(dy) and all_finite(x)):
            raise NumericalError(f"{name}: a gradient is NaN or infinite; check weights")
        for moment, rows in zip(self.moments, self.slices, strict=True):
            weighted = x * dy[:, rows].square().mean(1, keepdim=True).sqrt()
            moment += weighted.T @ weighted

    def finish(self, sequences: int, length: int) -> GuidedCurvature:
        scale = 1.0 / (2 * sequences * length)
        return GuidedCurvature(
            tuple(M.double() * scale for M in self.moments), self.rows, sequences
        )
