"""The price of a bit: rates kept and used up, in few codes; and samples that stand for all."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from convex_caldera.quantizers.clustering import cluster, lloyd, seeded, thinned
from convex_caldera.quantizers.rate_search import code_within, log_price


@dataclass(frozen=True)
class Code:
    x: float
    rate: float


@settings(deadline=None, max_examples=60)
@given(
    rate=st.floats(0.3, 6), offset=st.floats(-5, 5), curve=st.floats(0.3, 2), dim=st.integers(1, 4)
)
def test_a_falling_rate_is_kept_and_used_up(
    rate: float, offset: float, curve: float, dim: int
) -> None:
    tried: list[Code] = []

    def solve(x: float, lower: Code | None) -> Code:
        assert lower is None or (lower.x < x and lower.rate > rate)
        tried.append(Code(x, float(np.logaddexp(0, curve * dim / 2 * (offset - x)))))
        return tried[-1]

    found = code_within(solve, rate, dim, 0.0, 1e-3)
    high = 8 + 2 * rate / dim
    within = [code for code in tried if code.rate <= rate or code.x >= high]
    assert found == min(within, key=lambda code: code.x)
    reachable = np.logaddexp(0, curve * dim / 2 * (offset + 8)) > rate
    if reachable and found.x < high:
        assert rate - 1e-3 <= found.rate <= rate
        assert len(tried) <= 22


@pytest.mark.parametrize("rate", [0.5, 2.0])
def test_rates_that_jump_end_at_the_jump(rate: float) -> None:
    found = code_within(lambda x, lower: Code(x, 3.0 * (x < 0.7)), rate, 1, -3.0, 1e-3)
    assert found.rate == 0 and 0.7 <= found.x < 0.701


def test_a_rate_that_nothing_exceeds_ends_at_the_least_price() -> None:
    tried = []

    def solve(x: float, lower: Code | None) -> Code:
        tried.append(x)
        return Code(x, 0.0)

    assert code_within(solve, 1.0, 2, 0.0, 1e-3).x == min(tried) == -8.0
    assert len(tried) <= 8


def test_the_first_guess_is_the_slope_of_high_rates() -> None:
    """error = c 2^(-2 R): its slope is 2 ln 2 times the error, by differences."""
    step, error = 1e-6, lambda rate: np.pi * np.e / 6 * 1.7 * 2.0 ** (-2 * rate)
    slope = (error(3.0 - step) - error(3.0 + step)) / (2 * step)
    assert 2 ** log_price(1.7, 3.0, 1) == pytest.approx(slope, rel=1e-6)


def test_thin_samples_weigh_like_all_points_and_hold_the_farthest() -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(40_000, 2, generator=random)
    x[7] = torch.tensor([30.0, -40.0])
    w = torch.rand(40_000, 1, generator=random).expand(-1, 2)
    few, weights = thinned(x, w, 16, random)
    assert len(few) < len(x) / 3 and (few == x[7].numpy()).all(1).any()
    assert weights.sum() == pytest.approx(float(w.sum()), rel=0.03)
    assert thinned(x[:1000], w[:1000], 16, random)[0].shape == (1000, 2)


def test_clusters_by_a_sample_are_as_good_as_by_all_points() -> None:
    x = torch.randn(40_000, 2, generator=torch.Generator().manual_seed(1)) ** 3
    w = torch.ones_like(x)

    def error(book: np.ndarray) -> float:
        nearest = torch.cdist(x.double(), torch.from_numpy(book).double()).amin(1)
        return float((nearest**2).mean())

    slow = seeded(x.numpy(), w.numpy(), 32, torch.Generator().manual_seed(0))
    slow, _ = lloyd(x.numpy(), w.numpy(), slow, 60, 1e-6)
    assert error(cluster(x, w, 32, 0, 25, 1e-4).numpy()) <= 1.03 * error(slow)
