"""Panels rounded with feedback by kernels: the plain loop, to the bit where sums are exact."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from convex_caldera.core.protocols import FittedQuantizer, RoundsPanels
from convex_caldera.errors import NumericalError
from convex_caldera.fit.rounding import round_panel
from convex_caldera.quantizers import ECSQ, ECVQ, DoubleScale, KMeans
from convex_caldera.quantizers.ecsq import FittedECSQ
from convex_caldera.quantizers.ecvq import FittedECVQ
from convex_caldera.quantizers.kmeans import FittedKMeans

ROWS = 9


def eighths(*shape: int, seed: int, span: int = 40) -> Tensor:
    """Multiples of 1/8, whose sums and products with quarters float32 holds exactly."""
    random = torch.Generator().manual_seed(seed)
    return torch.randint(-span, span + 1, shape, generator=random) / 8


def blocks(width: int, dim: int, group_size: int = -1, weighted: bool = False) -> FittedKMeans:
    quantizer = KMeans(4 / dim, dim, group_size)
    scales = 2.0 ** eighths(*_grid(width, group_size), seed=3, span=2).mul(8).round()
    importance = torch.linspace(1, 4, width).round() if weighted else None
    book = eighths(16, dim, seed=4, span=24).half()
    return FittedKMeans(quantizer, (ROWS, width), scales.half(), book, importance)


def _grid(width: int, group_size: int) -> tuple[int, int]:
    return (1, 1) if group_size < 0 else (ROWS, -(-width // group_size))


def scalars(width: int, bounded: bool) -> FittedECSQ:
    levels = torch.unique(eighths(32, seed=5)).half()[:16]
    levels = torch.cat([levels, levels[-1:].expand(32 - len(levels))])
    bounds = torch.linspace(-4, 4, 15) if bounded else None
    return FittedECSQ(ECSQ(2.0), (ROWS, width), torch.tensor([[0.5]]).half(), levels, bounds)


def priced(width: int) -> FittedECVQ:
    book, costs = eighths(64, 2, seed=6).half(), torch.arange(40) / 16
    return FittedECVQ(ECVQ(2.0, 2), (ROWS, width), torch.tensor([[2.0]]).half(), book, costs)


def scaled(width: int) -> FittedQuantizer:
    plain = DoubleScale(KMeans(2, 2), 3).fit(torch.randn(ROWS, width))
    grid = 2.0 ** torch.arange(plain.grid.numel()).remainder(5).view(plain.grid.shape).float()
    grid[0, 0] = 0
    return type(plain)(
        plain.quantizer, (ROWS, width), plain.scale_codes, plain.steps, plain.offset, grid,
        blocks(width, 2),
    )  # fmt: skip


@pytest.mark.parametrize("width", [12, 11])
@pytest.mark.parametrize(
    "make",
    [
        lambda n: blocks(n, 1),
        lambda n: blocks(n, 2, weighted=True),
        lambda n: blocks(n, 4),
        lambda n: blocks(n, 2, 4),
        lambda n: scalars(n, True),
        lambda n: scalars(n, False),
        priced,
        scaled,
    ],
    ids=["1", "2 weighted", "4", "groups", "cells", "levels", "priced", "scaled"],
)
def test_kernels_round_panels_like_the_plain_loop(make, width: int) -> None:  # type: ignore[no-untyped-def]
    """In float64 the driver takes the plain loop; eighths are exact in both."""
    fitted = make(width)
    assert isinstance(fitted, RoundsPanels)
    target, base = eighths(ROWS, width, seed=1), eighths(ROWS, width, seed=2)
    coupling = torch.randint(-1, 2, (width, width), generator=torch.Generator().manual_seed(0)) / 4
    kept = target.clone()
    codes, values = round_panel(target, base, coupling, fitted, 0)
    assert torch.equal(target, kept)
    plain, exact = round_panel(target.double(), base.double(), coupling.double(), fitted, 0)
    assert torch.equal(codes, plain) and codes.dtype == plain.dtype
    assert torch.equal(values.double(), exact)


def test_panels_within_a_matrix_have_their_own_scales_and_weights() -> None:
    fitted = blocks(12, 2, 4, weighted=True)
    x, none = eighths(ROWS, 6, seed=1), torch.zeros(6, 6)
    codes, values = fitted.round_panel(x, x, none, 4)
    assert torch.equal(codes, fitted.encode(x, 4))
    assert torch.equal(values, fitted.decode(codes, 4))


@pytest.mark.parametrize("fitted", [blocks(4, 2), scalars(4, True)], ids=["blocks", "scalars"])
def test_feedback_that_overflows_is_refused(fitted: RoundsPanels) -> None:
    x = torch.full((ROWS, 4), 1e30)
    with pytest.raises(NumericalError, match="feedback"):
        fitted.round_panel(x, x, torch.full((4, 4), 1e30), 0)
