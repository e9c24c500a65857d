"""Spectra say what they claim: singular values under a metric, and the loss that rank leaves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from convex_caldera.core.hessian import Hessian
from convex_caldera.core.problem import Problem
from convex_caldera.fit.low_rank import fit_low_rank
from convex_caldera.workflow.spectra import MOST_VALUES, layer_spectra, singular_values


def draw(m: int, n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(m, n, generator=generator, dtype=torch.float64)
    X = torch.randn(3 * n, n, generator=generator, dtype=torch.float64)
    return W, X.T @ X / (3 * n)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)])
def test_singular_values_are_those_of_a_root(shape):
    W, H = draw(*shape)
    C = torch.linalg.cholesky(H)
    expected = torch.linalg.svdvals(W @ C).numpy()
    assert singular_values(W, H) == pytest.approx(expected, rel=1e-9)
    assert singular_values(W, None) == pytest.approx(torch.linalg.svdvals(W).numpy(), rel=1e-9)


def test_loss_left_is_that_of_the_best_factors():
    W, H = draw(8, 12)
    found = layer_spectra(W, torch.zeros_like(W), H)
    problem = Problem(W, Hessian(H), "layer")
    assert found["ranks"] == list(range(9))
    for rank, left in zip(found["ranks"], found["loss_left"], strict=True):
        L, R = fit_low_rank(W, H, rank)
        assert problem.relative_loss(L @ R) == pytest.approx(left, rel=1e-5, abs=1e-12)
    assert found["residual"] == found["whitened"]


def test_spectra_of_large_matrices_are_sampled_in_order():
    W, H = draw(300, 400)
    found = layer_spectra(W, 0.9 * W, H)
    index = found["index"]
    assert len(index) <= 1.5 * MOST_VALUES
    assert (index[0], index[-1]) == (1, 300)
    assert np.all(np.diff(index) > 0)
    assert np.array(found["residual"]) == pytest.approx(0.1 * np.array(found["whitened"]), rel=1e-4)


def test_spectra_of_nothing_are_zero():
    found = layer_spectra(torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(4, 4))
    assert set(found["whitened"]) == set(found["loss_left"]) == {0.0}
