"""Learned levels and codebooks: golden distortions, weights, and data that have little to learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from convex_caldera.coding.rans import Rans
from convex_caldera.coding.symbols import symbol_bits
from convex_caldera.core.protocols import Quantizer, RateLimited
from convex_caldera.errors import RecipeError
from convex_caldera.quantizers import ECSQ, ECVQ, ClippedUniform, KMeans, LloydMax, codebooks
from convex_caldera.quantizers.scalar_levels import Points, best_levels, lloyd

# Mean squared errors on N(0, 1): Max 1960, table I; two bits of entropy at high-rate theory's
# pi e / 6 times Shannon's 1/16.
LLOYD_MAX = {1: 0.3634, 2: 0.1175, 3: 0.0345, 4: 0.0095}
ECSQ_2 = 0.0889

LEARNED: list[Quantizer] = [
    ClippedUniform(3),
    LloydMax(3),
    LloydMax(3, 0),
    KMeans(1.5, 2),
    KMeans(1.0, 4, group_size=8),
    ECSQ(1.5),
    ECVQ(1.0, 2, iterations=5),
]


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(quantizer: Quantizer, W: Tensor, importance: Tensor | None = None) -> float:
    fitted = quantizer.fit(W, importance=importance)
    missed = (fitted.decode(fitted.encode(W)) - W).double().square()
    return float((missed if importance is None else missed * importance).mean())


@pytest.mark.parametrize("bits", LLOYD_MAX)
@pytest.mark.parametrize("group_size", [-1, 0])
def test_lloyd_max_reaches_the_known_distortion(bits: int, group_size: int) -> None:
    assert error(LloydMax(bits, group_size), gaussian(512, 1024)) == pytest.approx(
        LLOYD_MAX[bits], rel=0.01
    )


def test_ecsq_reaches_the_known_distortion_as_stored() -> None:
    W, quantizer = gaussian(1024, 1024), ECSQ(2.0)
    fitted = quantizer.fit(W)
    codes = fitted.encode(W)
    stream = Rans(symbol_bits(quantizer)).encode(fitted.pack(codes))
    assert stream.numel() <= quantizer.most_coded_bytes((1024, 1024))
    assert 8 * stream.numel() / W.numel() <= 2.0
    assert (fitted.decode(codes) - W).square().mean() <= 1.01 * ECSQ_2


@pytest.mark.slow
def test_wider_blocks_and_free_rates_are_worth_something() -> None:
    W = gaussian(256, 512)
    assert error(KMeans(2, 2), W) < 0.95 * error(KMeans(2, 1), W)
    assert error(ECVQ(1.0, 2), W) < 0.98 * error(ECSQ(1.0), W) < 0.98 * error(LloydMax(1), W)


def test_best_levels_are_the_best_of_all() -> None:
    """Every way to cut nine points into three runs, by hand."""
    values = np.array([0.0, 0.1, 0.3, 1.0, 1.1, 1.2, 5.0, 5.5, 9.0])
    mass = np.array([1.0, 4, 1, 2, 1, 1, 3, 1, 0.5])
    points = Points(values, mass)

    def cost(levels: np.ndarray) -> float:
        return float((mass * np.abs(values[:, None] - levels).min(1) ** 2).sum())

    cuts = [(i, j) for i in range(1, 8) for j in range(i + 1, 9)]
    runs = [np.split(np.arange(9), cut) for cut in cuts]
    means = [np.array([np.average(values[r], weights=mass[r]) for r in run]) for run in runs]
    assert cost(best_levels(points, 3, 50)) == pytest.approx(min(map(cost, means)))
    stationary = lloyd(points, np.array([0.0, 0.2, 3.0]), 50)
    assert cost(best_levels(points, 3, 50)) <= cost(stationary) + 1e-12


def test_binned_levels_equal_those_of_every_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    W, importance = gaussian(96, 200), torch.rand(200, generator=torch.Generator().manual_seed(1))
    exact = LloydMax(4, 0).fit(W, importance=importance).levels.float()
    monkeypatch.setattr("convex_caldera.quantizers.scalar_levels.BINS", 1 << 14)
    binned = LloydMax(4, 0).fit(W, importance=importance).levels.float()
    torch.testing.assert_close(binned, exact, atol=5e-3, rtol=0)


@pytest.mark.parametrize("quantizer", [LloydMax(2), KMeans(1.5, 2), KMeans(2, 1)], ids=str)
def test_importance_lowers_the_error_that_it_weighs(quantizer: Quantizer) -> None:
    W = gaussian(128, 64) * torch.linspace(0.2, 2, 64)
    importance = torch.linspace(3, 0, 64) ** 4
    plain = quantizer.fit(W)
    codes = plain.encode(W)
    unweighted = float(((plain.decode(codes) - W).square() * importance).mean())
    assert error(quantizer, W, importance) < 0.9 * unweighted


def test_samples_hold_the_extremes() -> None:
    W = gaussian(64, 256)
    W[3, 5], W[60, 255] = 40.0, -55.0
    for quantizer in (LloydMax(6, sample_size=200), KMeans(2, 2, sample_size=400)):
        fitted = quantizer.fit(W)
        decoded = fitted.decode(fitted.encode(W))
        assert abs(decoded[3, 5] - 40) < 8 and abs(decoded[60, 255] + 55) < 8


@pytest.mark.parametrize("dim", [1, 2, 3, 8])
def test_compiled_search_equals_all_differences(dim: int) -> None:
    random = torch.Generator().manual_seed(1)
    x, weights = gaussian(777, dim), torch.rand(7, dim, generator=random)
    book, bias = gaussian(33, dim, seed=2), torch.rand(33, generator=random) / 4
    book[20], bias[20] = book[5], bias[5]  # of two alike the first is taken
    one = codebooks.nearest(x, weights, book, bias)
    assert torch.equal(one, codebooks.nearest_plain(x, weights, book, bias))


def test_entropy_constrained_vectors_beat_scalars_as_stored() -> None:
    W, quantizer = gaussian(512, 1024), ECVQ(2.0, 2)
    fitted = quantizer.fit(W)
    codes = fitted.encode(W)
    stream = Rans(symbol_bits(quantizer)).encode(fitted.pack(codes))
    assert 1.98 <= 8 * stream.numel() / W.numel() <= 2.0
    assert (fitted.decode(codes) - W).square().mean() <= 0.995 * ECSQ_2


def test_wider_steps_keep_what_was_learned_and_lower_the_rate() -> None:
    W = gaussian(128, 256)
    for quantizer in (ECSQ(2.0), ECVQ(2.0, 2)):
        fitted = quantizer.fit(W)
        wide = fitted.widened(2.0)
        assert float(wide.scales) == pytest.approx(2 * float(fitted.scales), rel=1e-3)
        coder = Rans(symbol_bits(quantizer))
        sizes = [coder.encode(f.pack(f.encode(W))).numel() * 8 / W.numel() for f in (fitted, wide)]
        assert 0.7 < sizes[0] - sizes[1] < 1.1


def test_codewords_that_lose_their_points_are_put_to_use() -> None:
    """Two tight clouds and eight codewords: all of them end up somewhere different."""
    W = torch.cat([gaussian(64, 2) / 100, 5 + gaussian(64, 2, seed=1) / 100])
    book = KMeans(1.5, 2).fit(W).codebook
    assert len(torch.unique(book, dim=0)) == 8


@pytest.mark.parametrize("quantizer", LEARNED, ids=str)
@pytest.mark.parametrize("value", [0.0, 1.0, -3.5])
@pytest.mark.parametrize("shape", [(1, 1), (4, 8), (3, 7)])
def test_constant_matrices_are_kept(
    quantizer: Quantizer, value: float, shape: tuple[int, int]
) -> None:
    W = torch.full(shape, value)
    fitted = quantizer.fit(W)
    torch.testing.assert_close(fitted.decode(fitted.encode(W)), W, rtol=2e-3, atol=0)


@pytest.mark.parametrize("quantizer", LEARNED, ids=str)
def test_fewer_values_than_levels_are_all_kept(quantizer: Quantizer) -> None:
    if isinstance(quantizer, RateLimited | ClippedUniform):
        return  # a rate may be below the entropy of two values, a range has its own levels
    W = torch.tensor([1.0, -1.0]).repeat(6, 4)
    fitted = quantizer.fit(W)
    torch.testing.assert_close(fitted.decode(fitted.encode(W)), W, rtol=2e-3, atol=0)


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (LloydMax, {"bits": 0}, "1 to 8 bits"),
        (LloydMax, {"bits": 9}, "1 to 8 bits"),
        (LloydMax, {"iterations": 0}, "iterations"),
        (LloydMax, {"normalize": "max"}, "rms or absmax"),
        (KMeans, {"bits": 1.5, "dim": 3}, "4.5"),
        (KMeans, {"bits": 4, "dim": 4}, "1 to 12"),
        (KMeans, {"dim": 0}, "columns"),
        (KMeans, {"group_size": 6, "dim": 4}, "no multiple"),
        (KMeans, {"sample_size": 0}, "positive"),
        (ECSQ, {"bits": 0.1}, "0.25 to 6"),
        (ECVQ, {"bits": 2.0, "dim": 4}, "0.5 to 6"),
        (ClippedUniform, {"clip_ratio": 0.0}, "clip_ratio"),
        (ClippedUniform, {"bits": 9}, "1 to 8"),
    ],
)
def test_impossible_options_are_refused(kind: type, options: dict, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        kind(**options)
