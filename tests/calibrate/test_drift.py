"""Targets that make up for drift: the least-squares law, the search, and what is refused."""

from __future__ import annotations

import pytest
import torch

from convex_caldera.calibrate.drift import DriftAccumulator, Moments, correction, drift_target
from convex_caldera.errors import DataError, NumericalError, ShapeError

SAMPLES, TOKENS, N, M = 6, 40, 8, 5


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def drifted(kind: str) -> tuple[torch.Tensor, DriftAccumulator]:
    """A weight, and moments of inputs that drifted by a matrix, by noise, or not at all."""
    x = normal(SAMPLES, TOKENS, N)
    bent = torch.eye(N) + 0.2 * normal(N, N, seed=1)
    moved = {"bent": x @ bent, "noisy": x + 0.3 * normal(SAMPLES, TOKENS, N, seed=2), "same": x}
    drift = DriftAccumulator("site", N)
    for sample in range(0, SAMPLES, 2):
        part = slice(sample, sample + 2)
        drift.add(x[part], moved[kind][part], range(sample, sample + 2))
    return normal(M, N, seed=3), drift


def test_correction_is_the_least_squares_solution_as_the_ridge_vanishes() -> None:
    f, q = normal(200, N).double(), normal(200, N, seed=5).double()
    moments = Moments(f.T @ f, f.T @ q, q.T @ q)
    W = normal(M, N, seed=6).double()
    best = torch.linalg.lstsq(q, f @ W.T).solution.T
    assert torch.allclose(W + correction(W, moments, 1e-12), best, atol=1e-8)


def test_without_drift_the_target_is_the_weight() -> None:
    W, drift = drifted("same")
    target, blend = drift_target(W, drift)
    assert target is W
    assert blend.factor == 0.0 and max(abs(blend.drift), abs(blend.left)) < 1e-9


@pytest.mark.parametrize(("kind", "at_most"), [("bent", 0.01), ("noisy", 0.99)])
def test_drift_that_can_be_undone_is_undone_and_noise_in_part(kind: str, at_most: float) -> None:
    W, drift = drifted(kind)
    target, blend = drift_target(W, drift)
    assert target.dtype == W.dtype and not torch.equal(target, W)
    assert 0 < blend.factor <= 1 and blend.left <= at_most * blend.drift
    _, search = drift.finish()
    exact, moved = W.double(), target.double()
    left = (
        ((exact @ search.original) * exact).sum()
        - 2 * ((exact @ search.crossed) * moved).sum()
        + ((moved @ search.compressed) * moved).sum()
    ) / ((exact @ search.original) * exact).sum()
    assert float(left) == pytest.approx(blend.left, rel=0.2, abs=2e-3)


def test_one_sample_in_three_is_kept_for_the_search() -> None:
    _, drift = drifted("noisy")
    fit, search = drift.finish()
    everything = drift.all_samples()
    mixed = (4 * fit.crossed + 2 * search.crossed) / 6
    assert torch.allclose(mixed, everything.crossed)
    statistics = drift.inputs()
    assert statistics.num_tokens == SAMPLES * TOKENS
    assert torch.allclose(statistics.second_moment(), everything.compressed, rtol=1e-5)


def test_too_few_samples_are_refused() -> None:
    drift = DriftAccumulator("site", N)
    drift.add(normal(2, TOKENS, N), normal(2, TOKENS, N), range(2))
    with pytest.raises(DataError, match="at least 3 calibration windows"):
        drift.finish()


def test_reads_that_differ_or_cannot_be_told_apart_are_refused() -> None:
    drift = DriftAccumulator("site", N)
    with pytest.raises(ShapeError, match="from the original model but"):
        drift.add(normal(4, N), normal(3, N), range(1))
    with pytest.raises(ShapeError, match="selection of the tokens"):
        drift.add(normal(7, N), normal(7, N), range(3))
    with pytest.raises(NumericalError, match="NaN or infinite in samples 0 to 0"):
        drift.add(normal(4, N), normal(4, N) / 0.0, range(1))
