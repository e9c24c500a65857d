"""Nuclear-norm fits meet their closed forms, their duals and a cone solver."""

import numpy as np
import pytest
import torch

from convex_caldera.errors import RecipeError
from convex_caldera.fit.nuclear_norm import debias, fit_nuclear_norm, mu_for_rank
from tests.examples import first


def problem(m: int, n: int, seed: int, rank: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    W = rng.normal(size=(m, rank)) @ rng.normal(size=(rank, n)) + 0.2 * rng.normal(size=(m, n))
    X = rng.normal(size=(n, 3 * n)) * np.exp(rng.normal(size=(n, 1)))
    return torch.from_numpy(W), torch.from_numpy(X @ X.T / (3 * n))


def norm_of_start(A: torch.Tensor, H: torch.Tensor) -> float:
    return float(torch.linalg.matrix_norm(A @ H, 2))


# Under H = I the objective is 1-strongly convex: ||Z - Z*||^2 <= 2 gap primal, and primal < 100.
CLOSED_FORM = first(1, [(1e-8, 2e-3), (1e-12, 1e-9)])


@pytest.mark.parametrize(("tol", "atol"), CLOSED_FORM)
def test_nuclear_norm_identity_is_thresholding(tol, atol):
    A, _ = problem(12, 9, 0)
    U, S, Vh = torch.linalg.svd(A, full_matrices=False)
    fit = fit_nuclear_norm(A, None, mu=float(S[2]), tol=tol)
    closed = (U * (S - S[2]).clamp_min(0)) @ Vh
    assert torch.allclose(fit.left @ fit.right, closed, atol=atol)


@pytest.mark.parametrize(("tol", "atol"), CLOSED_FORM)
def test_nuclear_norm_constraint_on_the_identity_is_projection(tol, atol):
    A, _ = problem(12, 9, 1)
    tau = 0.3 * float(torch.linalg.matrix_norm(A, "nuc"))
    fit = fit_nuclear_norm(A, None, tau=tau, tol=tol)
    S = torch.linalg.svdvals(A)
    kept = torch.linalg.svdvals(fit.left @ fit.right)
    assert float(kept.sum()) == pytest.approx(tau, rel=atol)
    shift = S[: fit.rank] - kept[: fit.rank]
    assert torch.allclose(shift, shift[0].expand_as(shift), atol=atol)


@pytest.mark.parametrize("shape", [(9, 14), (14, 9), (120, 150)])
@pytest.mark.parametrize("share", [0.5, 0.1, 0.01])
def test_nuclear_norm_gap_is_true(shape, share):
    A, H = problem(*shape, seed=2)
    mu = share * norm_of_start(A, H)
    fit = fit_nuclear_norm(A, H, mu=mu, tol=1e-7)
    assert 0 <= fit.gap <= 1e-7
    Z = fit.left @ fit.right
    E = A - Z
    nuclear = float(torch.linalg.matrix_norm(Z, "nuc"))
    primal = 0.5 * float(((E @ H) * E).sum()) + mu * nuclear
    assert fit.primal == pytest.approx(primal, rel=1e-9)
    rng = np.random.default_rng(0)
    for size in (1e-3, 1e-2, 0.1):
        other = Z + size * torch.from_numpy(rng.normal(size=shape))
        E = A - other
        value = 0.5 * float(((E @ H) * E).sum())
        assert value + mu * float(torch.linalg.matrix_norm(other, "nuc")) >= fit.dual


@pytest.mark.slow
def test_nuclear_norm_meets_a_cone_solver():
    cp = pytest.importorskip("cvxpy", reason="cvxpy is the oracle; pip install cvxpy")
    A, H = problem(6, 7, 4)
    mu = 0.2 * norm_of_start(A, H)
    Z = cp.Variable((6, 7))
    root = np.linalg.cholesky(H.numpy())
    value = 0.5 * cp.sum_squares((A.numpy() - Z) @ root) + mu * cp.normNuc(Z)
    oracle = cp.Problem(cp.Minimize(value))
    oracle.solve(solver=cp.CLARABEL)
    fit = fit_nuclear_norm(A, H, mu=mu, tol=1e-9)
    assert fit.primal == pytest.approx(oracle.value, rel=1e-6)


@pytest.mark.parametrize("rank", [0, 1, 4])
def test_nuclear_norm_target_rank_is_kept(rank):
    A, H = problem(10, 9, 5)
    mu = mu_for_rank(A, H, rank)
    fit = fit_nuclear_norm(A, H, mu=mu, tol=1e-6)
    assert fit.rank <= rank
    if 0 < rank:
        assert fit_nuclear_norm(A, H, mu=0.5 * mu, tol=1e-6).rank >= fit.rank


def test_nuclear_norm_debiasing_removes_shrinkage():
    A, H = problem(20, 15, 6)
    fit = fit_nuclear_norm(A, H, mu=0.2 * norm_of_start(A, H))
    left, right = debias(A, H, fit.rank)

    def loss(Z: torch.Tensor) -> float:
        return float((((A - Z) @ H) * (A - Z)).sum())

    assert left.shape[1] == fit.rank
    assert loss(left @ right) < loss(fit.left @ fit.right)


def test_nuclear_norm_singular_and_zero_hessians():
    A, _ = problem(6, 8, 7)
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    fit = fit_nuclear_norm(A, x @ x.T, mu=0.1, tol=1e-8)
    assert fit.gap <= 1e-8
    assert fit.rank <= 2
    zero = fit_nuclear_norm(A, torch.zeros(8, 8, dtype=torch.float64), mu=0.1)
    assert (zero.rank, zero.primal, zero.gap) == (0, 0.0, 0.0)


def test_nuclear_norm_stopped_early_reports_a_wider_gap():
    A, H = problem(30, 20, 8)
    mu = 0.02 * norm_of_start(A, H)
    gaps = [fit_nuclear_norm(A, H, mu=mu, tol=0.0, most_steps=n).gap for n in (1, 5, 60)]
    assert gaps[0] > gaps[1] > gaps[2] >= 0


@pytest.mark.parametrize("bad", [{}, {"mu": 1.0, "tau": 1.0}, {"mu": -1.0}, {"tau": -0.1}])
def test_nuclear_norm_bad_arguments_are_refused(bad):
    with pytest.raises(RecipeError):
        fit_nuclear_norm(torch.eye(3), None, **bad)


def test_nuclear_norm_bad_rank_is_refused():
    with pytest.raises(RecipeError, match="out of range"):
        mu_for_rank(torch.eye(3), None, 4)
