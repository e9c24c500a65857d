"""Compressed layers of every build, for training tests."""

from __future__ import annotations

import torch
from torch import Tensor

from convex_caldera.core.recipe import FactorCoding, FitLowRank, Quantize, Recipe
from convex_caldera.core.terms import CompressedLayer
from convex_caldera.quantizers.clipped_uniform import ClippedUniform
from convex_caldera.quantizers.double_scale import DoubleScale
from convex_caldera.quantizers.e8p import E8P
from convex_caldera.quantizers.kmeans import KMeans
from convex_caldera.quantizers.lloyd_max import LloydMax
from convex_caldera.quantizers.normal_float import NormalFloat
from convex_caldera.quantizers.strip_order import StripOrder
from convex_caldera.quantizers.trellis import Trellis
from convex_caldera.quantizers.uniform import Uniform
from convex_caldera.transforms import ActOrder, ColumnScale, RandomizedHadamard
from tests.storage.making import make_layer

PLAIN = Quantize(Uniform(3, group_size=8, search=False), "identity")
LATTICE = Quantize(E8P(2), "identity")
CODED = FitLowRank(4, factors=FactorCoding(E8P(4)))
BUILDS: dict[str, Recipe] = {
    "uniform": Recipe((PLAIN,)),
    "dense factors": Recipe((FitLowRank(3), PLAIN), transforms=(ColumnScale(),)),
    "caldera": Recipe((CODED, LATTICE), transforms=(RandomizedHadamard(),)),
    "inputs alone": Recipe((LATTICE, CODED), transforms=(RandomizedHadamard(outputs=False),)),
    "two transforms": Recipe((FitLowRank(2), PLAIN), transforms=(ColumnScale(), ActOrder())),
    "trellis": Recipe(
        (Quantize(Trellis(2.0, 6, row_scales=True), "identity"),),
        transforms=(RandomizedHadamard(),),
    ),
    "trained trellis": Recipe((Quantize(Trellis(2.0, 6, "table"), "identity"),)),
    "strips": Recipe(
        (
            Quantize(
                StripOrder(DoubleScale(KMeans(2.0, 2, -1))),
                "identity",
            ),
        )
    ),
    "levels": Recipe((Quantize(LloydMax(2, 8), "identity"),)),
    "range": Recipe((Quantize(ClippedUniform(3, group_size=8), "identity"),)),
    "normal float": Recipe((Quantize(NormalFloat(3, group_size=8), "identity"),)),
}
SHAPE = (24, 40)


def weight(shape: tuple[int, int] = SHAPE, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def build(name: str, shape: tuple[int, int] = SHAPE) -> CompressedLayer:
    return make_layer(weight(shape), BUILDS[name])


def inputs(n: int = SHAPE[1], tokens: int = 6) -> Tensor:
    return torch.randn(2, tokens, n, generator=torch.Generator().manual_seed(9))
