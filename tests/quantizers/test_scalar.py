"""Uniform and NormalFloat: levels, published distortions, the range search, hard groups."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from convex_caldera.errors import FormatError, NumericalError, RecipeError
from convex_caldera.quantizers import NormalFloat, Uniform
from convex_caldera.quantizers.distortion import gaussian_distortion
from convex_caldera.quantizers.groups import Groups
from convex_caldera.quantizers.normal_float import levels

ABSMAX = {"symmetric": True, "search": False, "legacy_levels": True}


def gaussian(m: int, n: int, seed: int = 0) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def rounded(quantizer: Uniform | NormalFloat, W: Tensor, **options: Tensor) -> Tensor:
    fitted = quantizer.fit(W, **options)
    return fitted.decode(fitted.encode(W))


@pytest.mark.parametrize(
    ("quantizer", "size", "error", "tolerance"),
    [
        (Uniform(2, 64, **ABSMAX), (512, 1024), 0.518, 0.02),
        (Uniform(4, 64, **ABSMAX), (512, 1024), 0.01175, 0.02),
        (Uniform(8, 64, **ABSMAX), (512, 1024), 4e-5, 0.15),
        # one scale for 131 072 weights: their largest, so the figure varies from draw to draw
        (Uniform(2, -1, **ABSMAX), (128, 1024), 0.943, 0.02),
        (Uniform(4, -1, **ABSMAX), (128, 1024), 0.0380, 0.2),
        (Uniform(8, -1, **ABSMAX), (128, 1024), 1.2e-4, 0.2),
        (NormalFloat(2, 64), (512, 1024), 0.3185, 0.02),
        (NormalFloat(4, 64), (512, 1024), 0.00851, 0.02),
        (NormalFloat(2, -1), (128, 1024), 0.588, 0.05),
        (NormalFloat(4, -1), (128, 1024), 0.0162, 0.1),
    ],
    ids=str,
)
def test_absmax_distortion_is_the_published_one(
    quantizer: Uniform | NormalFloat, size: tuple[int, int], error: float, tolerance: float
) -> None:
    found, bits = gaussian_distortion(quantizer, size)
    assert found == pytest.approx(error, rel=tolerance)
    side = 16 / 64 if quantizer.group_size == 64 else 16 / (128 * 1024)
    assert bits == quantizer.bits + side


def test_searched_uniform_nears_the_best_uniform_step() -> None:
    """Max, 1960: the best evenly spaced 4 and 16 levels for N(0, 1) leave .1188 and .01154.

    Grids here contain zero, which costs a little at 2 bits (.150) and nothing at 4.
    """
    assert gaussian_distortion(Uniform(4, -1), (64, 1024))[0] < 1.05 * 0.01154
    assert gaussian_distortion(Uniform(2, -1), (64, 1024))[0] < 0.152
    assert gaussian_distortion(Uniform(1, -1, symmetric=True), (64, 1024))[0] == pytest.approx(
        1 - 2 / torch.pi, rel=0.02
    )


@given(
    st.integers(1, 8),
    st.sampled_from([-1, 0, 3, 8]),
    st.booleans(),
    st.integers(0, 10**6),
    st.booleans(),
)
def test_search_never_loses_to_covering(
    bits: int, group_size: int, symmetric: bool, seed: int, heavy: bool
) -> None:
    W = gaussian(3, 10, seed)
    W = W**5 if heavy else W
    importance = gaussian(1, 10, seed + 1)[0].square()
    searched = rounded(Uniform(bits, group_size, symmetric), W, importance=importance)
    covering = rounded(Uniform(bits, group_size, symmetric, search=False), W)
    losses = [((V - W).square() * importance).sum() for V in (searched, covering)]
    assert losses[0] <= losses[1] * (1 + 1e-5) + 1e-10


def test_search_heeds_importance() -> None:
    W = gaussian(64, 32)
    importance = torch.where(torch.arange(32) < 4, 1.0, 1e-3)
    plain, weighted = rounded(Uniform(2, 0), W), rounded(Uniform(2, 0), W, importance=importance)
    assert ((weighted - W).square() * importance).sum() < (
        0.8 * ((plain - W).square() * importance).sum()
    )


def test_covering_affine_reaches_both_ends() -> None:
    W = torch.tensor([[-1.0, 0.5, 2.0, 0.0]])
    fitted = Uniform(2, 0, search=False, scale_dtype="float32").fit(W)
    assert fitted.scales.item() == 1.0 and fitted.zero_points.item() == 1
    assert fitted.encode(W).tolist() == [[0, 1, 3, 1]] or fitted.encode(W).tolist() == [
        [0, 2, 3, 1]
    ]
    assert fitted.decode(torch.tensor([[0, 1, 2, 3]])).tolist() == [[-1.0, 0.0, 1.0, 2.0]]


def test_symmetric_levels() -> None:
    W = torch.tensor([[-4.0, 3.0]])
    fitted = Uniform(3, 0, symmetric=True, search=False).fit(W)
    codes = torch.arange(8)[None, :2]
    assert fitted.scales.item() == 1.0 and fitted.decode(codes).tolist() == [[-4.0, -3.0]]
    legacy = Uniform(3, 0, **ABSMAX).fit(torch.tensor([[-3.0, 2.0]]))
    assert legacy.decode(torch.tensor([[0, 6]])).tolist() == [[-3.0, 3.0]]
    with pytest.raises(FormatError, match=r"0 \.\. 6, got 7"):
        legacy.unpack(Uniform(3, 0).fit(W).pack(torch.tensor([[0, 7]])))


def test_normal_float_levels() -> None:
    assert levels(2).tolist() == pytest.approx([-1, 0, 0.33792, 1], abs=1e-5)
    below = [-1, -0.69619, -0.52507, -0.39492, -0.28444, -0.18477, -0.09105, 0]
    above = [0.07958, 0.16093, 0.24611, 0.33792, 0.44071, 0.56262, 0.72296, 1]
    assert levels(4).tolist() == pytest.approx(below + above, abs=1e-5)
    assert all((levels(b).diff() > 0).all() and levels(b).numel() == 2**b for b in range(2, 9))


@pytest.mark.parametrize("group_size", [1, 3, 7, 10, 64, 0, -1])
def test_groups_split_and_spread_agree(group_size: int) -> None:
    """`spread` gives each column the value of the group that `split` put it into."""
    groups = Groups((2, 10), group_size)
    parts = groups.split(torch.arange(1.0, 21.0).view(2, 10))
    assert parts.shape[:2] == groups.grid and parts.sum() == 210
    labels = torch.arange(float(parts.shape[0] * parts.shape[1])).view(groups.grid)
    spread = groups.spread(labels, 0, 10).expand(2, 10)
    for row in range(2):
        for column in range(10):
            value = 1 + 10 * row + column
            where = (parts == value).nonzero()[0]
            assert labels[where[0], where[1]] == spread[row, column]
    assert torch.equal(groups.spread(labels, 4, 3).expand(2, 3), spread[:, 4:7])


@pytest.mark.parametrize("value", [0.7, -0.7, 1e-3, 300.0])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("search", [False, True])
def test_constant_groups_are_kept(value: float, symmetric: bool, search: bool) -> None:
    W = torch.full((2, 8), value)
    for bits in (2, 4, 8):
        W_hat = rounded(Uniform(bits, 4, symmetric, search), W)
        torch.testing.assert_close(W_hat, W, rtol=2e-3, atol=0)


def test_tiny_groups_beside_ordinary_ones_become_zero_and_others_do_not() -> None:
    W = gaussian(2, 16)
    W[:, 8:] *= 1e-10
    for quantizer in (Uniform(4, 8), Uniform(4, 8, symmetric=True), NormalFloat(4, 8)):
        W_hat = rounded(quantizer, W)
        assert (W_hat[:, 8:].abs() < 1e-6).all()
        assert (W_hat[:, :8] - W[:, :8]).square().mean() < 0.02


@pytest.mark.parametrize("make", [Uniform, NormalFloat])
def test_scales_beyond_float16_are_refused_with_a_remedy(make: type) -> None:
    for factor in (1e8, 1e-9):
        W = gaussian(2, 16) * factor
        with pytest.raises(NumericalError, match="float32"):
            make(4, 8).fit(W)
        W_hat = rounded(make(4, 8, scale_dtype="float32"), W)
        assert ((W_hat - W) / factor).square().mean() < 0.02


def test_huge_outlier_spoils_its_own_group_only() -> None:
    W = gaussian(4, 256)
    W[0, 0] = 1e4
    W_hat = rounded(Uniform(4, 64), W)
    clean = torch.ones_like(W, dtype=torch.bool)
    clean[0, :64] = False
    assert W_hat[0, 0] == pytest.approx(1e4, rel=0.05)
    assert (W_hat - W)[clean].square().mean() < 0.01


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 0},
        {"bits": 9},
        {"bits": 4, "group_size": -2},
        {"bits": 4, "scale_dtype": "float8"},
        {"bits": 4, "legacy_levels": True},
        {"bits": 1, "symmetric": True, "legacy_levels": True},
    ],
    ids=str,
)
def test_uniform_refuses_contradictions(options: dict) -> None:
    with pytest.raises(RecipeError):
        Uniform(**options)


@pytest.mark.parametrize("options", [{"bits": 1}, {"bits": 9}, {"bits": 4, "group_size": -2}])
def test_normal_float_refuses_contradictions(options: dict) -> None:
    with pytest.raises(RecipeError):
        NormalFloat(**options)
