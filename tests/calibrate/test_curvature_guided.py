"""Grouped Fisher curvature, and problems whose metric differs between groups of rows."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from convex_caldera.calibrate.curvature import sequence_curvature, sequence_gradients
from convex_caldera.calibrate.curvature_guided import guided_curvature
from convex_caldera.core.hessian import Hessian
from convex_caldera.core.problem import Problem, row_slices
from convex_caldera.core.recipe import FitLowRank, Quantize, Recipe
from convex_caldera.core.terms import Coded
from convex_caldera.errors import NumericalError, RecipeError, ShapeError
from convex_caldera.fit.backfit import fit_layer
from convex_caldera.fit.rounding import round_ldlq
from convex_caldera.models.original import load_original
from convex_caldera.quantizers.trellis import Trellis
from convex_caldera.quantizers.uniform import Uniform
from convex_caldera.recipes.convex import convex_caldera_recipe
from convex_caldera.recipes.guided import group_count, guided_recipe, keep_rows_apart
from convex_caldera.transforms.hadamard import RandomizedHadamard

NAMES = {"seed": 0, "layer": "l", "site": "s"}


def metric(n: int, seed: int, scale: float = 1.0) -> Hessian:
    x = torch.randn(4 * n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x *= torch.linspace(0.1, 2.0, n, dtype=torch.float64)
    return Hessian(scale * x.T @ x / len(x), 0.01, f"H{seed}")


def grouped(m: int = 40, n: int = 24, groups: int = 2) -> Problem:
    W = torch.randn(m, n, generator=torch.Generator().manual_seed(1))
    slices = row_slices(m, groups)
    return Problem.by_row_groups(W, tuple(metric(n, k, 1.0 + k) for k in range(len(slices))), "W")


@given(st.integers(1, 200), st.integers(1, 9))
def test_row_slices_cover_all_rows_at_tile_heights(rows: int, groups: int) -> None:
    slices = row_slices(rows, groups)
    assert [i for s in slices for i in range(s.start, s.stop)] == list(range(rows))
    assert len(slices) <= groups and all(s.start % 16 == 0 for s in slices)
    assert row_slices(rows, len(slices)) == slices


def test_loss_by_row_groups_is_the_sum_of_their_losses() -> None:
    problem = grouped()
    W_hat = problem.W.round()
    parts = [
        Problem(problem.W[rows], H).loss(W_hat[rows])
        for rows, H in zip(problem.row_groups, problem.groups, strict=True)
    ]
    assert problem.loss(W_hat) == pytest.approx(sum(parts), rel=1e-12)
    assert problem.relative_loss(torch.zeros_like(problem.W)) == pytest.approx(1.0)


def test_one_row_group_is_the_plain_problem() -> None:
    H = metric(24, 3)
    W = torch.randn(40, 24, generator=torch.Generator().manual_seed(2))
    recipe = Recipe((Quantize(Uniform(3, group_size=0)),))
    alone = fit_layer(Problem.by_row_groups(W, (H,)), recipe, **NAMES)
    plain = fit_layer(Problem(W, H), recipe, **NAMES)
    assert torch.equal(alone.layer.decode(), plain.layer.decode())
    assert alone.loss == pytest.approx(plain.loss, rel=1e-9)


def test_every_group_is_rounded_with_its_own_feedback() -> None:
    problem = grouped()
    recipe = Recipe((Quantize(Uniform(3, group_size=0)),))
    fit = fit_layer(problem, recipe, **NAMES)
    (term,) = fit.layer.terms
    assert isinstance(term, Coded)
    for rows, H in zip(problem.row_groups, problem.groups, strict=True):
        codes, _ = round_ldlq(problem.W[rows], term.fitted.take_rows(rows), H.unit_upper(1))
        assert torch.equal(term.codes[rows], codes)
    mean = fit_layer(Problem(problem.W, problem.hessian), recipe, **NAMES)
    assert fit.loss < problem.loss(mean.layer.decode())


def test_low_rank_steps_see_rows_weighted_by_their_group() -> None:
    problem = grouped()
    recipe = keep_rows_apart(convex_caldera_recipe(2.0, rank=4))
    fit = fit_layer(problem, recipe, **NAMES)
    assert fit.layer.rank == 4 and 0 < fit.relative_loss < 0.3
    alone = fit_layer(problem, Recipe((FitLowRank(24),)), **NAMES)
    assert alone.relative_loss < 1e-5


def test_rotations_of_the_outputs_are_refused_and_left_out() -> None:
    with pytest.raises(RecipeError, match=r"l: hadamard mixes output channels"):
        fit_layer(grouped(), convex_caldera_recipe(2.0), **NAMES)
    apart = keep_rows_apart(convex_caldera_recipe(2.0))
    assert apart.transforms == (RandomizedHadamard(outputs=False),)
    assert fit_layer(grouped(), apart, **NAMES).relative_loss < 0.3
    outputs = Recipe(apart.steps, transforms=(RandomizedHadamard(inputs=False),))
    with pytest.raises(RecipeError, match="rotate the inputs instead"):
        keep_rows_apart(outputs)


def test_groups_inside_a_chain_of_tiles_are_refused() -> None:
    trellis = Trellis(2.0, 10, chain=2)
    problem = grouped(m=48, groups=3)
    with pytest.raises(RecipeError, match="begins at row 16, inside the 32 rows that trellis"):
        fit_layer(problem, Recipe((Quantize(trellis),)), **NAMES)


def test_metrics_that_do_not_fit_the_rows_are_refused() -> None:
    W = torch.zeros(40, 24)
    with pytest.raises(ShapeError, match="40 rows, 5 row groups"):
        Problem.by_row_groups(W, tuple(metric(24, k) for k in range(5)), "W")
    with pytest.raises(ShapeError, match="does not fit"):
        Problem(W, metric(24, 0), "W", None, (metric(23, 0), metric(24, 0)))
    with pytest.raises(ShapeError, match="40 rows, 5 row groups"):
        dataclasses.replace(grouped(), groups=tuple(metric(24, k) for k in range(5)))


# --- from gradients ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tiny_model):
    return load_original(tiny_model("llama"))


LAYER = "model.layers.1.mlp.down_proj"


def tokens(count: int = 3) -> torch.Tensor:
    return torch.randint(2, 300, (count, 12), generator=torch.Generator().manual_seed(4))


@pytest.mark.slow
def test_groups_predict_what_single_tokens_say(model) -> None:
    """Windows of one token have one gradient g x^T; for an error in one row all is exact."""
    single = tokens(6)[:, :1]
    found = guided_curvature(model, single, [LAYER], seed=3, groups=3)[LAYER]
    E = torch.zeros(48, 112)
    E[20] = torch.randn(112, generator=torch.Generator().manual_seed(0))
    said = [
        float((G[rows].T @ G[rows]).trace()) / (2 * len(single))
        for rows in row_slices(48, 3)
        for G in [sum_of_squares(model, single, rows)]
    ]
    for H, rows, energy in zip(found.groups, row_slices(48, 3), said, strict=True):
        assert float(H.trace()) * (rows.stop - rows.start) == pytest.approx(energy, rel=2e-2)
    assert found.rows == 48 and found.sequences == 6


def sum_of_squares(model, windows: torch.Tensor, rows: slice) -> torch.Tensor:
    """A matrix whose rows' squares are those of all gradients together."""
    gradients = [G for _, G in sequence_gradients(model, windows, [LAYER], 3, 4)]
    return torch.stack(gradients).square().sum(0).sqrt()


def test_few_rows_take_fewer_groups(model) -> None:
    layer = "model.layers.0.self_attn.k_proj"
    found = guided_curvature(model, tokens(), [layer, LAYER], seed=0, groups=8)
    assert len(found[layer].groups) == 2 and len(found[LAYER].groups) == 3
    Problem.by_row_groups(torch.zeros(48, 112), found[LAYER].hessians(LAYER), LAYER)
    assert len(guided_curvature(model, tokens(), [LAYER], seed=0)[LAYER].groups) == 1


def test_the_width_of_a_layer_decides_its_groups() -> None:
    recipe = convex_caldera_recipe(2.0)
    assert (group_count((64, 1023)), group_count((64, 1024))) == (1, 4)
    assert guided_recipe(recipe, (64, 1023)) is recipe
    assert guided_recipe(recipe, (64, 1024)) == keep_rows_apart(recipe)


def test_bad_groups_and_gradients_are_refused(model) -> None:
    with pytest.raises(RecipeError, match="at least one group"):
        guided_curvature(model, tokens(), [LAYER], seed=0, groups=0)

    def spoil(_module, _args, y):
        y.register_hook(lambda dy: dy * float("nan"))

    handle = model.get_submodule(LAYER).register_forward_hook(spoil)
    try:
        for collect in (guided_curvature, sequence_curvature):
            with pytest.raises(NumericalError, match="gradient is NaN or infinite"):
                collect(model, tokens(), [LAYER], seed=0)
    finally:
        handle.remove()
