"""The structured solver meets a cone solver, closed forms, and a checker written from scratch."""

import json
import math

import numpy as np
import pytest
import torch

from convex_caldera.allocate.program import ProgramSolution, solve_program
from convex_caldera.allocate.program_rank import mu_for_ranks
from convex_caldera.allocate.program_record import program_record
from convex_caldera.core.hessian import Hessian
from convex_caldera.errors import (
    DataError,
    InfeasibleBudgetError,
    NumericalError,
    RecipeError,
    ShapeError,
)
from tests.examples import first
from tests.oracles.convex_program import Instance, random_instance, solve_by_cone

ROUNDING = 1e-9  # relative; the checker below is plain double precision


def solve(instance: Instance, **options) -> ProgramSolution:
    W = [torch.from_numpy(w) for w in instance.W]
    H = [torch.from_numpy(h) for h in instance.H]
    return solve_program(W, H, **instance.constants(), **options)


def recompute(instance: Instance, found: ProgramSolution) -> tuple[float, float]:
    """Primal and dual values from the certificate's data alone, in numpy, without any root of H.

    Asserts feasibility of both on the way.
    """
    primal, dual, used = 0.0, -found.price * instance.budget, 0.0
    assert found.price >= 0
    for g, (W, H) in enumerate(zip(instance.W, instance.H, strict=True)):
        left, right = (factor.numpy() for factor in found.low_rank[g])
        R, b, s = found.residual[g].numpy(), found.bits[g], found.multipliers[g]
        assert instance.b_min[g] <= b <= instance.b_max[g]
        assert 0 <= s <= instance.lam[g] / instance.kappa[g]
        used += instance.p[g] * b
        nuclear = 0.5 * (np.sum(left**2) + np.sum(right**2))
        assert nuclear >= np.linalg.norm(left @ right, "nuc") * (1 - ROUNDING)
        E = W - left @ right - R
        q = max(np.sum(R * R) / instance.kappa[g], instance.c[g] * math.exp(-instance.k[g] * b))
        primal += 0.5 * np.sum((E @ H) * E) + instance.lam[g] * q
        dual_left, weights = found.duals[g].left.numpy(), found.duals[g].weights.numpy()
        E = found.duals[g].scale * (E - (dual_left * weights) @ (dual_left.T @ E))
        Y = E @ H
        norm = np.linalg.norm(Y, 2)
        dual += np.sum(Y * W) - 0.5 * np.sum(Y * E)
        if s > 0:
            dual -= np.sum(Y * Y) / (4 * s)
        else:
            assert norm <= ROUNDING * np.linalg.norm(W @ H)
        if instance.mu is not None:
            assert norm <= instance.mu[g] * (1 + ROUNDING)
            primal += instance.mu[g] * nuclear
        else:
            assert nuclear <= instance.tau[g] * (1 + ROUNDING)
            dual -= instance.tau[g] * norm
        grid = np.linspace(instance.b_min[g], instance.b_max[g], 20001)
        t = instance.lam[g] - instance.kappa[g] * s
        curve = t * instance.c[g] * np.exp(-instance.k[g] * grid)
        dual += np.min(curve + found.price * instance.p[g] * grid)
    assert used <= instance.budget * (1 + 1e-14)
    return primal, dual


@pytest.mark.parametrize("form", ["penalty", "constrained"])
@pytest.mark.parametrize("seed", first(3, [1, 2, 4, 0, 3, *range(5, 12)]))
def test_program_certificate_recomputes(seed, form):
    instance = random_instance(seed, form)
    found = solve(instance, tol=1e-7)
    assert found.status == "optimal"
    assert 0 <= found.gap <= 1e-7
    assert found.dual <= found.primal
    primal, dual = recompute(instance, found)
    assert found.primal == pytest.approx(primal, rel=ROUNDING)
    # The checker's grid over b can only overstate the minimum.
    assert found.dual == pytest.approx(dual, rel=1e-6)
    assert found.dual <= dual + ROUNDING * abs(dual)


@pytest.mark.slow  # both values of a certificate, which every run recomputes, say as much
@pytest.mark.parametrize("form", ["penalty", "constrained"])
@pytest.mark.parametrize("seed", range(6))
def test_program_meets_a_cone_solver(seed, form):
    pytest.importorskip("cvxpy", reason="cvxpy is the oracle; pip install cvxpy")
    instance = random_instance(seed + 100, form, most=8)
    found = solve(instance, tol=1e-9)
    oracle = solve_by_cone(instance)
    assert found.primal == pytest.approx(oracle["objective"], rel=1e-6)
    assert found.price == pytest.approx(oracle["price"], rel=1e-4, abs=1e-8)
    if found.price > 1e-6:  # otherwise the bits are not unique
        assert found.bits == pytest.approx(oracle["bits"], abs=1e-4)


@pytest.mark.slow
def test_program_exponential_cone_orientation():
    """One variable: least q with q >= c exp(-k b) and b <= 3 is c exp(-3 k), by both solvers."""
    cp = pytest.importorskip("cvxpy", reason="cvxpy is the oracle; pip install cvxpy")
    c, k = 2.0, 1.5
    q, b = cp.Variable(), cp.Variable()
    cone = cp.ExpCone(-k * b, cp.Constant(1.0), q / c)
    problem = cp.Problem(cp.Minimize(q), [cone, b <= 3])
    problem.solve(solver=cp.CLARABEL)
    least = c * math.exp(-3 * k)
    assert problem.value == pytest.approx(least, rel=1e-5)
    wrong = cp.ExpCone(cp.reshape(q, (), order="C"), cp.Constant(c), -k * b)
    swapped = cp.Problem(cp.Minimize(q), [wrong, b >= 0.1, q >= 0])
    swapped.solve(solver=cp.CLARABEL)
    assert swapped.status == "infeasible"
    zero = torch.zeros(2, 2)
    found = solve_program(
        [zero],
        [None],
        mu=1.0,
        lam=1.0,
        kappa=1.0,
        c=c,
        k=k,
        p=1.0,
        b_min=0.0,
        b_max=9.0,
        budget=3.0,
    )
    assert found.primal == pytest.approx(least, rel=1e-12)
    assert found.bits == pytest.approx((3.0,), abs=1e-12)
    assert found.price == pytest.approx(k * least, rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("lam", [0.01, 1.0, 10.0])
def test_program_single_group_identity_is_thresholding(lam):
    """H = I, ample bits: Z = SVT(W, mu (kappa + 2 lam) / (2 lam))."""
    rng = np.random.default_rng(5)
    W = rng.normal(size=(16, 12))
    kappa, S = 1.0, np.linalg.svd(W, compute_uv=False)
    threshold = 0.5 * S[0]
    mu = threshold * 2 * lam / (kappa + 2 * lam)
    found = solve_program(
        [torch.from_numpy(W)],
        [None],
        mu=mu,
        lam=lam,
        kappa=kappa,
        c=1e-9,
        k=1.0,
        p=1.0,
        b_min=1.0,
        b_max=8.0,
        budget=4.0,
        tol=1e-12,
    )
    U, S, Vh = np.linalg.svd(W, full_matrices=False)
    closed = (U * np.maximum(S - threshold, 0)) @ Vh
    left, right = found.low_rank[0]
    assert (left @ right).numpy() == pytest.approx(closed, abs=1e-6)
    assert found.price == 0.0


@pytest.mark.parametrize("form", first(1, ["constrained", "penalty"]))
def test_program_stopped_early_is_valid_and_wider(form):
    instance = random_instance(7, form)
    full = solve(instance, tol=1e-9)
    gaps = []
    for steps in (1, 2, 4, 8, 16):
        found = solve(instance, tol=1e-9, most_steps=steps)
        recompute(instance, found)
        assert found.dual <= full.primal * (1 + 1e-9)
        assert found.primal >= full.dual * (1 - 1e-9)
        gaps.append(found.gap)
        assert (found.status == "optimal") == (found.gap <= 1e-9)
    assert gaps[0] >= gaps[-1]
    assert gaps[0] > 1e-9


def _single(W: torch.Tensor, H, **changed) -> ProgramSolution:
    constants = {
        "mu": 0.1,
        "lam": 1.0,
        "kappa": 1.0,
        "c": 1.0,
        "k": 1.386,
        "p": 1.0,
        "b_min": 1.0,
        "b_max": 8.0,
        "budget": 3.0,
    }
    return solve_program([W], [H], **(constants | changed))


def test_program_mu_for_ranks_keeps_them():
    instance = random_instance(3, "penalty", most=10)
    W = [torch.from_numpy(w) for w in instance.W]
    H = [torch.from_numpy(h) for h in instance.H]
    constants = instance.constants()
    del constants["mu"], constants["tau"]
    constants["c"] = constants["c"] * 1e-4  # R costs what its energy costs, so that Z pays
    ranks = [g % 3 for g in range(len(W))]
    mu = mu_for_ranks(W, H, ranks, **constants)
    found = solve_program(W, H, mu=mu, tol=1e-5, **constants)
    assert all(r <= wanted for r, wanted in zip(found.ranks, ranks, strict=True))
    looser = solve_program(W, H, mu=[m / 3 for m in mu], tol=1e-5, **constants)
    assert any(r > wanted for r, wanted in zip(looser.ranks, ranks, strict=True))
    with pytest.raises(RecipeError, match="out of range"):
        mu_for_ranks(W, H, [99] * len(W), **constants)


def test_program_record_rebuilds_both_values():
    instance = random_instance(5, "penalty", most=8)
    found = solve(instance, tol=1e-6)
    names = [f"layer.{g}" for g in range(len(instance.W))]
    record, tensors = program_record(found, names)
    text = json.dumps(record, allow_nan=False)
    row = json.loads(text)["groups"][0]
    E0 = instance.W[0] - (tensors["layer.0.left"] @ tensors["layer.0.right"]).numpy()
    E0 = E0 - tensors["layer.0.residual"].numpy()
    A, w = tensors["layer.0.dual_left"].numpy(), tensors["layer.0.dual_weights"].numpy()
    E = row["dual_scale"] * (E0 - A @ (w[:, None] * (A.T @ E0)))
    again = found.dual_matrix(0, torch.from_numpy(instance.W[0])).numpy()
    assert pytest.approx(again, abs=1e-12) == E
    assert row["rank"] == found.ranks[0]
    with pytest.raises(ShapeError, match="different names"):
        program_record(found, ["a"] * len(names))


def test_program_zero_and_rank_deficient_hessians():
    W = torch.from_numpy(np.random.default_rng(1).normal(size=(6, 5)))
    nothing = _single(W, torch.zeros(5, 5))
    assert nothing.ranks == (0,)
    assert nothing.gap <= 1e-6
    x = torch.from_numpy(np.random.default_rng(2).normal(size=(5, 2)))
    singular = _single(W, x @ x.T, mu=0.05, tol=1e-8)
    assert singular.status == "optimal"
    instance = Instance(
        [W.numpy()],
        [(x @ x.T).numpy()],
        *(np.array([v]) for v in (1.0, 1.0, 1.0, 1.386, 1.0, 1.0, 8.0)),
        budget=3.0,
        mu=np.array([0.05]),
    )
    primal, _ = recompute(instance, singular)
    assert singular.primal == pytest.approx(primal, rel=ROUNDING)


def test_program_zero_weight_needs_only_its_bits():
    found = _single(torch.zeros(4, 3), None)
    assert found.ranks == (0,)
    assert found.primal == pytest.approx(math.exp(-1.386 * 3), rel=1e-9)


def test_program_takes_hessians_and_shares_them():
    rng = np.random.default_rng(3)
    X = torch.from_numpy(rng.normal(size=(20, 5)))
    hessian = Hessian(X.T @ X / 20, damping=0.05)
    W = [torch.from_numpy(rng.normal(size=(4, 5))) for _ in range(2)]
    constants = {"lam": 1.0, "kappa": 2.0, "c": 1.0, "k": 1.0, "p": 1.0, "b_min": 1.0, "b_max": 8.0}
    constants["budget"] = 5.0
    shared = solve_program(W, [hessian, hessian], mu=0.2, **constants)
    apart = solve_program(W, [hessian.damped, hessian.damped.clone()], mu=0.2, **constants)
    assert shared.primal == pytest.approx(apart.primal, rel=1e-6)
    assert len(hessian._memo) == 1


@pytest.mark.parametrize(
    ("changed", "error", "says"),
    [
        ({"mu": None}, RecipeError, "exactly one"),
        ({"tau": 1.0}, RecipeError, "exactly one"),
        ({"mu": -1.0}, RecipeError, "mu of group 0"),
        ({"kappa": 0.0}, RecipeError, "kappa of group 0"),
        ({"k": math.nan}, RecipeError, "k of group 0"),
        ({"b_min": 9.0}, RecipeError, "exceeds b_max"),
        ({"lam": [1.0, 2.0]}, ShapeError, "lam"),
        ({"budget": math.nan}, RecipeError, "budget"),
        ({"budget": 0.5}, InfeasibleBudgetError, "below sum p b_min"),
    ],
)
def test_program_bad_constants_are_refused(changed, error, says):
    with pytest.raises(error, match=says):
        _single(torch.ones(3, 2), None, **changed)


def test_program_bad_matrices_are_refused():
    W = torch.ones(3, 2)
    with pytest.raises(ShapeError, match="3 rows"):
        _single(W, torch.eye(3))
    with pytest.raises(ShapeError, match="square"):
        _single(W, torch.ones(2, 3))
    with pytest.raises(NumericalError, match="eigenvalue"):
        _single(W, torch.tensor([[1.0, 2.0], [2.0, 1.0]]))
    with pytest.raises(NumericalError, match=r"W\[0\]"):
        _single(W * math.inf, None)
    with pytest.raises(NumericalError, match=r"H\[0\]"):
        _single(W, torch.eye(2) * math.nan)
    with pytest.raises(DataError, match="no groups"):
        solve_program([], [], mu=1, lam=1, kappa=1, c=1, k=1, p=1, b_min=1, b_max=2, budget=3)
