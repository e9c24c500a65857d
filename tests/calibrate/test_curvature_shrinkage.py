"""Shrinkage of curvatures, and the choice by what rounding would cost on unseen sequences."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from convex_caldera.calibrate.curvature import Curvature
from convex_caldera.calibrate.curvature_shrinkage import (
    Shrinkage,
    choose_shrinkage,
    shrink,
    shrunk,
    white_noise_loss,
)
from convex_caldera.errors import RecipeError
from convex_caldera.linalg.factor import block_ldl


def moment(n: int, samples: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, n, generator=generator, dtype=torch.float64)
    lags = (torch.arange(n)[:, None] - torch.arange(n)[None]).abs()
    x = x @ torch.linalg.cholesky(0.8**lags).T.double()
    return x.T @ x / samples


def curvature(samples: int, seed: int, n: int = 24, m: int = 12) -> Curvature:
    return Curvature(moment(n, samples, seed), moment(m, samples, seed + 99), samples)


@given(st.floats(0.0, 1.0), st.booleans())
def test_shrinking_keeps_trace_and_symmetry(share: float, towards_input: bool) -> None:
    H, target = moment(6, 20, 0), moment(6, 20, 1) if towards_input else None
    drawn = shrink(H, share, target)
    assert float(drawn.trace()) == pytest.approx(float(H.trace()))
    assert torch.allclose(drawn, drawn.T)


def test_shrinking_wholly_is_the_target() -> None:
    H, target = moment(6, 20, 0), moment(6, 20, 1)
    assert torch.allclose(shrink(H, 1.0), torch.eye(6, dtype=H.dtype) * H.trace() / 6)
    assert torch.allclose(shrink(H, 1.0, target), target * (H.trace() / target.trace()))
    assert shrink(H, 0.0) is H


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_shares_out_of_range_are_refused(share: float) -> None:
    with pytest.raises(RecipeError, match="between 0 and 1"):
        shrink(moment(4, 9, 0), share)


def test_noise_costs_the_mean_of_d_under_its_own_metric() -> None:
    H = moment(8, 80, 2)
    _, D = block_ldl(H, 1)
    assert white_noise_loss(H, H) == pytest.approx(float(D.diagonal().mean()), rel=1e-2)
    other = moment(8, 80, 3)
    assert white_noise_loss(other, H) > white_noise_loss(H, H)


def test_few_sequences_are_shrunk_and_many_hardly() -> None:
    unseen = {"a": curvature(4000, 7)}
    few = choose_shrinkage({"a": curvature(30, 1)}, unseen)
    many = choose_shrinkage({"a": curvature(4000, 1)}, unseen)
    assert few.input > many.input and few.output > many.output
    assert many.input <= 0.02
    assert few.scores["input"][f"{few.input:g}"] < 0 == few.scores["input"]["0"]


def test_a_good_target_is_trusted_more_than_the_identity() -> None:
    seen, unseen = {"a": curvature(30, 1)}, {"a": curvature(4000, 7)}
    truth = {"a": moment(24, 4000, 11)}
    plain, towards = choose_shrinkage(seen, unseen), choose_shrinkage(seen, unseen, truth)
    assert towards.towards == "input"
    best = towards.scores["towards_input"][f"{towards.input:g}"]
    assert best < plain.scores["input"][f"{plain.input:g}"]
    drawn = shrunk(seen["a"], towards, truth["a"])
    assert torch.allclose(drawn.input, shrink(seen["a"].input, towards.input, truth["a"]))


def test_layers_without_gradient_have_no_say() -> None:
    dead = Curvature(torch.zeros(24, 24, dtype=torch.float64), torch.zeros(12, 12), 4)
    seen = {"a": curvature(30, 1), "dead": dead}
    unseen = {"a": curvature(4000, 7), "dead": dead}
    assert choose_shrinkage(seen, unseen) == choose_shrinkage({"a": seen["a"]}, unseen)
    nothing = choose_shrinkage({"dead": dead}, {"dead": dead})
    assert (nothing.input, nothing.output) == (0.0, 0.0)
    said = {"input": 0.1, "output": 0.2, "towards": "identity", "scores": {}}
    assert Shrinkage(0.1, 0.2).to_dict() == said
