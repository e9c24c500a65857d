"""The rigorous values of the convex program enclose those of the solver, which is not used."""

from __future__ import annotations

import copy
import functools
import math

import numpy as np
import pytest
import torch

from convex_caldera.allocate.program import solve_program
from convex_caldera.allocate.program_record import program_record
from convex_caldera.certify.program import check_program, proved_semidefinite
from convex_caldera.certify.rounding import is_semidefinite, spectral_norm_above
from convex_caldera.errors import CheckError, FormatError

CONSTANTS = {
    "lam": 30.0,
    "kappa": 200.0,
    "c": 1.5,
    "k": 2 * math.log(2),
    "p": 120.0,
    "b_min": 0.5,
    "b_max": 6.0,
}


def problem(form, seed=0, groups=2, steps=2000, budget=180.0):
    """Record, tensors, weights and Hessians of a solved program; a copy, to be spoiled."""
    return copy.deepcopy(_problem(form, seed, groups, steps, budget))


@functools.cache
def _problem(form, seed, groups, steps, budget):
    draw = torch.Generator().manual_seed(seed)
    shapes = [(10, 12), (14, 9), (8, 8)][:groups]
    W = [torch.randn(s, generator=draw, dtype=torch.float64) for s in shapes]
    H = []
    for _, n in shapes:
        X = torch.randn(3 * n, n, generator=draw, dtype=torch.float64)
        H.append(X.T @ X / len(X))
    extra = {"mu": 0.4} if form == "penalty" else {"tau": 4.0}
    solution = solve_program(W, H, **extra, **CONSTANTS, budget=budget, most_steps=steps)
    names = [f"g{i}" for i in range(groups)]
    record, tensors = program_record(solution, names)
    arrays = {key: value.numpy() for key, value in tensors.items()}
    weights = {name: w.numpy() for name, w in zip(names, W, strict=True)}
    hessians = {name: h.numpy() for name, h in zip(names, H, strict=True)}
    return record, arrays, weights, hessians


@pytest.mark.parametrize("form", ["penalty", "constrained"])
@pytest.mark.parametrize("seed", range(3))
def test_program_values_are_enclosed(form, seed):
    record, *data = problem(form, seed, budget=150.0 + 150 * seed)
    found = check_program(record, *data)
    assert found.dual <= found.primal
    assert found.gap <= record["gap"] + 1e-9
    assert found.primal == pytest.approx(record["primal"], rel=1e-10)
    assert found.dual == pytest.approx(record["dual"], rel=1e-8)


def test_a_solver_that_stops_early_still_has_a_valid_bound():
    early, *data = problem("penalty", steps=3)
    done, *_ = problem("penalty")
    found = check_program(early, *data)
    best = check_program(done, *problem("penalty")[1:])
    assert found.dual <= best.primal * (1 + 1e-12)
    assert best.dual <= found.primal * (1 + 1e-12)


@pytest.mark.parametrize("form", ["penalty", "constrained"])
@pytest.mark.parametrize(
    "change",
    [
        {"dual": 1.001},
        {"primal": 0.999},
        {"price": 3.0},
        {"price": -1.0},
        {"budget": 0.5},
    ],
    ids=str,
)
def test_flattering_values_are_refused(form, change):
    record, *data = problem(form)
    for key, factor in change.items():
        record[key] *= factor
    with pytest.raises((CheckError, FormatError)):
        check_program(record, *data)


def test_altered_solutions_are_refused():
    record, tensors, weights, hessians = problem("penalty")
    for key in ("g1.left", "g1.residual"):
        with pytest.raises(CheckError):
            check_program(record, {**tensors, key: tensors[key] * 1.1}, weights, hessians)
    with pytest.raises(CheckError):
        check_program(record, tensors, {**weights, "g0": weights["g0"] * 0.9}, hessians)
    with pytest.raises(FormatError):
        check_program(
            record, {**tensors, "g1.left": tensors["g1.left"] * np.nan}, weights, hessians
        )
    wrong = {**hessians, "g0": -hessians["g0"]}
    with pytest.raises(CheckError, match="semidefinite"):
        check_program(record, tensors, weights, wrong)


def test_singular_hessians_are_proved_semidefinite():
    x = np.random.default_rng(0).standard_normal((3, 20))
    H = x.T @ x
    shifted = proved_semidefinite(H, "H")
    assert np.abs(shifted - H).max() < 1e-10 * np.trace(H)
    assert not is_semidefinite(H - 1e-6 * np.eye(20))
    assert proved_semidefinite(np.zeros((4, 4)), "H").shape == (4, 4)


@pytest.mark.parametrize("shape", [(1, 1), (5, 9), (40, 12), (64, 64)])
def test_spectral_norm_is_bounded_from_above_and_closely(shape):
    for seed in range(5):
        Y = np.random.default_rng(seed).standard_normal(shape)
        exact = np.linalg.svd(Y, compute_uv=False)[0]
        bound = spectral_norm_above(Y)
        assert exact <= bound <= exact * (1 + 1e-9)
    assert spectral_norm_above(np.zeros(shape)) == 0.0
