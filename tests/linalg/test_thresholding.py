"""Proximal steps equal their closed forms, whichever decomposition they take."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from convex_caldera.linalg.thresholding import GRAM_RANGE, Thresholder, gram_svd
from tests.examples import examples

SHAPES = [(1, 1), (7, 3), (3, 7), (12, 12), (130, 110)]  # the last one goes by subspaces


def draw(m: int, n: int, seed: int, decades: float = 2.0) -> torch.Tensor:
    """A matrix whose singular values fall over some decades."""
    generator = torch.Generator().manual_seed(seed)
    G = torch.randn(m, n, generator=generator, dtype=torch.float64)
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    return (U * torch.logspace(0, -decades, min(m, n), dtype=torch.float64)) @ Vh


@given(st.sampled_from(SHAPES), st.integers(0, 1000), st.floats(0.0, 12.0))
@examples(40)
def test_gram_svd_has_unit_columns_in_order_and_large_values_right(shape, seed, decades):
    G = draw(*shape, seed, decades)
    U, S, V = gram_svd(G)
    exact = torch.linalg.svdvals(G)
    large = exact > GRAM_RANGE * exact[0]
    assert torch.all(S[:-1] >= S[1:])
    assert S[large].tolist() == pytest.approx(exact[large].tolist(), rel=1e-9)
    for columns in (U, V):
        norms = torch.linalg.vector_norm(columns[:, large], dim=0)
        assert norms.tolist() == pytest.approx([1.0] * int(large.sum()), rel=1e-12)
        gram = columns[:, large].T @ columns[:, large]
        assert torch.allclose(gram, torch.eye(len(gram), dtype=G.dtype), atol=1e-7)
    assert torch.allclose((U * S) @ V.T, G, atol=1e-13)


def test_gram_svd_of_zero_is_zero():
    U, S, V = gram_svd(torch.zeros(4, 2, dtype=torch.float64))
    assert torch.equal(S, torch.zeros(2, dtype=torch.float64))
    assert torch.isfinite(U).all()
    assert torch.isfinite(V).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("threshold", [0.0, 1e-9, 1e-3, 0.05, 0.6, 2.0])
def test_shrink_is_soft_thresholding(shape, threshold):
    G = draw(*shape, 3)
    found = Thresholder(shape, G, passes=6).shrink(G, threshold)
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    expected = (U * (S - threshold).clamp_min(0.0)) @ Vh
    assert torch.allclose(found.dense(), expected, atol=1e-9)
    assert torch.all(found.S > 0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999, 1.5])
def test_project_is_nearest_in_the_nuclear_ball(shape, share):
    G = draw(*shape, 4)
    S = torch.linalg.svdvals(G)
    radius = share * float(S.sum())
    found = Thresholder(shape, G, passes=6).project(G, radius)
    assert found.nuclear_norm <= radius * (1 + 1e-9)
    if share >= 1:
        assert torch.allclose(found.dense(), G, atol=1e-12)
        return
    assert found.nuclear_norm == pytest.approx(radius, rel=1e-7, abs=1e-12)
    # The nearest point X has G - X = theta times a subgradient, so its norm is the least gap.
    rest = torch.linalg.svdvals(G - found.dense())
    if found.rank:
        assert float(rest[0]) == pytest.approx(float(S[0] - found.S[0]), rel=1e-6)
