"""What a rank leaves: Eckart-Young, and what coded factors add to it."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from convex_caldera.allocate.rank_energy import factor_noise, log_energies, spectrum
from convex_caldera.core.hessian import Hessian
from convex_caldera.core.problem import Problem
from convex_caldera.core.recipe import Quantize, Recipe
from convex_caldera.fit.backfit import fit_layer
from convex_caldera.recipes.convex import convex_caldera_recipe
from tests.examples import examples


@examples(25)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 9))
def test_spectrum_is_that_of_the_singular_values(m: int, n: int, seed: int) -> None:
    W = torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected = torch.linalg.svdvals(W).square().numpy()
    np.testing.assert_allclose(spectrum(W), expected, atol=1e-9)


@examples(25)
@given(st.integers(2, 12), st.integers(2, 12), st.integers(0, 9), st.integers(2, 4))
def test_log_energies_are_eckart_young_and_rise_with_noise(
    m: int, n: int, seed: int, bits: int
) -> None:
    W = torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ranks = range(min(m, n) + 1)
    squares = spectrum(W)
    exact, coded = (log_energies(squares, ranks, d) for d in (0.0, factor_noise(bits)))
    assert exact[0] == coded[0] == 0.0
    assert all(a >= b for a, b in pairwise(exact))
    assert all(a <= b + 1e-12 for a, b in zip(exact, coded, strict=True))
    U, s, Vh = torch.linalg.svd(W, full_matrices=False)
    for r in list(ranks)[:-1]:
        rest = W - (U[:, :r] * s[:r]) @ Vh[:r]
        share = float(rest.square().sum() / W.square().sum())
        assert math.exp(exact[r]) == pytest.approx(share, rel=1e-6)


def test_a_matrix_of_zeros_has_nothing_to_take() -> None:
    assert log_energies(spectrum(torch.zeros(4, 6)), [0, 2, 4], 0.1) == [0.0, 0.0, 0.0]


def test_the_spectrum_predicts_what_a_rank_saves() -> None:
    """A decaying matrix under a random metric: measured loss within a fifth of e_r / e_0."""
    draw = torch.Generator().manual_seed(0)
    left, right = (torch.randn(k, 96, generator=draw) for k in (96, 128))
    W = (left * 0.9 ** torch.arange(96)) @ right.T
    X = torch.randn(512, 128, generator=draw) @ torch.randn(128, 128, generator=draw)
    problem = Problem(W, Hessian((X.T @ X).double() / 512, 0.01, "x"))
    names = {"seed": 0, "layer": "a", "site": "a"}
    losses = {r: fit_layer(problem, convex_caldera_recipe(2.0, r), **names).loss for r in (0, 16)}
    (_, said) = log_energies(spectrum(W), [0, 16], factor_noise(2))
    assert losses[16] / losses[0] == pytest.approx(math.exp(said), rel=0.2)


@pytest.mark.slow
def test_low_rank_of_the_weight_itself_serves_feedback_better_than_that_under_the_metric() -> None:
    draw = torch.Generator().manual_seed(1)
    left, right = (torch.randn(k, 96, generator=draw) for k in (96, 128))
    W = (left * 0.95 ** torch.arange(96)) @ right.T
    X = torch.randn(512, 128, generator=draw) * 0.97 ** torch.arange(128)
    problem = Problem(W, Hessian((X.T @ X).double() / 512, 0.01, "x"))
    plain = convex_caldera_recipe(2.0, 16)
    low_rank, quantize = plain.steps
    assert isinstance(quantize, Quantize)
    full = Recipe((type(low_rank)(16, "full", low_rank.factors), quantize), plain.transforms)
    names = {"seed": 0, "layer": "a", "site": "a"}
    assert fit_layer(problem, plain, **names).loss < fit_layer(problem, full, **names).loss
