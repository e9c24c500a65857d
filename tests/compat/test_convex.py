"""`convex_caldera`: the mission's program done right; every known mistake of it is a law here."""

import math

import pytest
import torch

from convex_caldera.compat import ConvexCalderaParams, convex_caldera, convex_caldera_decompose
from convex_caldera.compat.convex_program import earned_rank
from convex_caldera.core.hessian import Hessian
from convex_caldera.core.terms import Coded
from convex_caldera.errors import InfeasibleBudgetError, NumericalError, RecipeError, ShapeError
from tests.examples import first
from tests.problems import correlated_hessian, gaussian

M, N = 32, 48
PLANTED = 2


def weight():
    """Noise and a strong part of rank two, not square."""
    return gaussian(M, N) + 3 * gaussian(M, PLANTED, 1) @ gaussian(PLANTED, N, 2)


def hessian():
    return correlated_hessian(N).matrix


def small(**options):
    return ConvexCalderaParams(**{"num_groups": 3, "inner_iters": 2, **options})


@pytest.fixture(scope="module")
def result():
    """The defaults but for size, under a correlated H."""
    return convex_caldera(weight(), hessian(), params=small())


@pytest.fixture(scope="module")
def noise():
    """Plain noise, where no rank earns its bits."""
    return convex_caldera(gaussian(M, N), hessian(), params=small(B_tot=3.0))


def damped(place):
    return Hessian(hessian()).damped[place, place]


def columns(result):
    return [(info, slice(*info["columns"])) for info in result.group_info["groups"]]


def primal_value(W, result, mu):
    """The stated objective at the returned point, R bounded by q and q by the cone."""
    value, solution = 0.0, result.solution
    for g, (info, place) in enumerate(columns(result)):
        left, right = solution.low_rank[g]
        misfit = W[:, place] - left @ right - solution.residual[g]
        q = max(
            float(solution.residual[g].square().sum()) / info["kappa"],
            info["c"] * math.exp(-info["k"] * solution.bits[g]),
        )
        nuclear = float(torch.linalg.svdvals(left @ right).sum()) if left.shape[1] else 0.0
        value += 0.5 * float(((misfit @ damped(place)) * misfit).sum()) + mu * nuclear + q
    return value


def dual_value(W, result, mu):
    """The bound of the literature from the stored multipliers; lambda = 1."""
    solution, program = result.solution, result.group_info["certificates"]["program"]
    value = -solution.price * program["budget"]
    for g, (info, place) in enumerate(columns(result)):
        E, s = solution.dual_matrix(g, W[:, place]), solution.multipliers[g]
        Y = E @ damped(place)
        assert float(torch.linalg.matrix_norm(Y, 2)) <= mu * (1 + 1e-9)
        assert 0 <= s <= 1 / info["kappa"] * (1 + 1e-12)
        value += float((Y * W[:, place]).sum()) - 0.5 * float((E * Y).sum())
        if float(Y.norm()) > 0:
            value -= float(Y.square().sum()) / (4 * s)
        t, price = 1 - info["kappa"] * s, solution.price * W[:, place].numel()
        bits = torch.linspace(2, 8, 60001, dtype=torch.float64)
        value += float((t * info["c"] * (-info["k"] * bits).exp() + price * bits).min())
    return value


# --- the known mistakes ---------------------------------------------------------------------


@pytest.mark.parametrize("case", ["result", "noise"])
def test_duality_gap_is_primal_minus_dual_of_the_stated_program(case, request):
    result = request.getfixturevalue(case)
    W = (weight() if case == "result" else gaussian(M, N)).float().double()
    mu = result.group_info["certificates"]["program"]["mu"]
    primal, dual = primal_value(W, result, mu), dual_value(W, result, mu)
    assert result.objective_value == pytest.approx(primal, rel=1e-6)
    assert result.duality_gap == pytest.approx(primal - dual, abs=2e-6 * primal)
    assert 0 <= result.duality_gap <= 1e-4 * primal
    assert result.duality_gap != pytest.approx(result.relative_error, rel=1e-3)


@pytest.mark.slow
def test_bits_buy_objective_because_the_cone_is_the_right_way_round():
    values = [
        convex_caldera(gaussian(M, N), hessian(), params=small(B_tot=b, kappa=1e9)).objective_value
        for b in (2.5, 3.5, 5.0)
    ]
    # Reverse water-filling: with kappa out of the way q = c exp(-k b) falls by about 6 dB a bit.
    assert values[0] > 2 * values[1] > 6 * values[2] > 0


def test_bits_follow_sensitivity(noise):
    spread = torch.ones(N, dtype=torch.float64)
    spread[: N // 3] = 100.0
    params = small(B_tot=3.5, discrete_bits=range(2, 9))
    result = convex_caldera(gaussian(M, N), spread, params=params)
    assert result.b_star[0] > max(result.b_star[1:]) + 1
    assert result.b_discrete[0] > max(result.b_discrete[1:])
    weights, program = M * N, noise.group_info["certificates"]["program"]
    assert sum(noise.b_star) / 3 == pytest.approx(program["budget"] / weights, rel=1e-6)


def test_low_rank_part_is_not_always_zero(result, noise):
    assert result.effective_rank == PLANTED
    assert noise.effective_rank == 0
    without = convex_caldera(weight(), hessian(), params=small(rank_budget=0))
    assert without.effective_rank == 0
    assert result.relative_loss < without.relative_loss


@pytest.mark.parametrize("budget", first(1, [2.0, 1.5]))
def test_budget_below_the_cheapest_codes_raises(budget):
    with pytest.raises(InfeasibleBudgetError, match="least feasible") as caught:
        convex_caldera(gaussian(M, N), params=small(B_tot=budget))
    least = caught.value.least_bits / (M * N)
    assert budget < least
    enough = convex_caldera(gaussian(M, N), params=small(B_tot=least))
    assert enough.avg_bit_width <= least


@pytest.mark.parametrize("budget", first(2, [1.5, 4.7, 2.0, 2.2, 3.0]))
def test_rounding_never_exceeds_the_budget(budget):
    params = small(B_tot=budget, b_min=1, discrete_bits=(1, 2, 3, 4, 8))
    result = convex_caldera(weight(), hessian(), params=params)
    assert budget - 0.6 < result.avg_bit_width <= budget


def test_everything_stored_is_counted(result):
    m, n = weight().shape
    factors = [result.low_rank.left.values, result.low_rank.right.values]
    bits = sum(16 * factor.numel() for factor in factors)
    for part in result.parts:
        assert isinstance(part, Coded)
        side = part.fitted.tensors().values()
        bits += 8 * part.fitted.pack(part.codes).numel()
        bits += sum(8 * t.numel() * t.element_size() for t in side)
    assert result.avg_bit_width == bits / (m * n)
    assert result.avg_bit_width > sum(result.b_discrete) / 3  # codes alone are not all


def test_nothing_falls_between_the_terms(result):
    """The codes hold W minus the decoded low-rank part, and the sum is what is stored."""
    assert torch.equal(result.L_star + result.R_star, result.W_compressed)
    assert torch.equal(result.low_rank.decode(), result.L_star)
    stored = torch.cat([part.decode() for part in result.parts], dim=1)
    torch.testing.assert_close(stored, result.R_star, rtol=1e-5, atol=1e-5)
    assert torch.linalg.matrix_rank(result.L_star) == result.effective_rank
    error = (weight() - result.W_compressed.double()).norm()
    assert result.residual_norm == pytest.approx(float(error), rel=1e-5)
    assert result.relative_error == pytest.approx(float(error / weight().norm()), rel=1e-5)


@pytest.mark.slow
def test_factor_bits_change_what_is_stored(result):
    params = small(quantize_factors=True, factor_bits=4)
    coded = convex_caldera(weight(), hessian(), params=params)
    assert coded.effective_rank >= PLANTED
    assert isinstance(coded.low_rank.left, Coded)
    assert not torch.equal(coded.L_star, result.L_star)
    assert coded.low_rank.stored_bytes() / coded.effective_rank < (
        result.low_rank.stored_bytes() / result.effective_rank / 2
    )


@pytest.mark.parametrize(("bits", "most"), [(2, 0.16), (3, 0.05), (4, 0.015), (8, 1e-4)])
def test_quantizer_beats_three_levels_at_two_bits(bits, most):
    """The original's step reaches 0.715, 0.162, 0.0353 on N(0, 1) at 2, 3 and 4 bits."""
    params = ConvexCalderaParams(
        B_tot=bits + 0.7, b_min=1, Q_bits=bits, num_groups=1, rank_budget=0
    )
    result = convex_caldera(gaussian(64, 64), params=params)
    assert result.b_discrete == [bits]
    assert result.relative_error**2 < most


@pytest.mark.slow
def test_status_says_optimal_only_where_the_gap_proves_it(result):
    assert result.solver_status == "optimal"
    assert result.relative_duality_gap <= 1e-4
    tight = convex_caldera(weight(), hessian(), params=small(solver_tol=1e-9))
    assert tight.relative_duality_gap <= 1e-9 or tight.solver_status == "stopped"


def test_hessian_is_used(result):
    blind = convex_caldera(weight(), params=small())
    H, W = hessian(), weight()
    error = W - blind.W_compressed.double()
    loss = float(((error @ H) * error).sum()) / float(((W @ H) * W).sum())
    assert result.relative_loss < 0.7 * loss


# --- the program in its two forms -----------------------------------------------------------


def test_given_constants_meet_the_closed_form():
    """H = I, one group: Z = SVT(W, mu (kappa + 2 lambda) / (2 lambda)) where R binds q."""
    W, mu, kappa, lam = gaussian(M, N), 0.5, 0.1, 0.04
    params = small(
        num_groups=1, mu=mu, kappa=kappa, lambda_reg=lam, rank_budget=3, B_tot=6.0, solver_tol=1e-9
    )
    result = convex_caldera(W, params=params)
    U, S, Vh = torch.linalg.svd(W.float().double(), full_matrices=False)
    S = (S - mu * (kappa + 2 * lam) / (2 * lam)).clamp(min=0)
    left, right = result.solution.low_rank[0]
    torch.testing.assert_close(left @ right, (U * S) @ Vh, atol=1e-3, rtol=0)
    assert result.group_info["groups"][0]["kappa"] == kappa
    assert result.effective_rank <= 3


@pytest.mark.slow
def test_larger_mu_gives_less_rank():
    ranks = [
        sum(convex_caldera(weight(), params=small(mu=mu)).solution.ranks) for mu in (0.3, 0.6, 1e4)
    ]
    assert ranks[0] >= ranks[1] >= ranks[2] == 0
    assert ranks[0] > 0


def test_tau_bounds_the_nuclear_norm_and_wins_over_mu():
    tau = 40.0
    result = convex_caldera(weight(), hessian(), params=small(tau_star=tau, mu=1e9))
    Z = torch.cat([left @ right for left, right in result.solution.low_rank], dim=1)
    assert 0 < float(torch.linalg.svdvals(Z).sum()) <= tau * (1 + 1e-9)
    assert result.group_info["certificates"]["program"]["mu"] is None


@pytest.mark.slow
def test_ranks_asked_for_are_kept():
    sought = convex_caldera(weight(), params=small(target_rank=1))
    assert sought.effective_rank == 1
    assert max(sought.solution.ranks) <= 1
    capped = convex_caldera(weight(), params=small(mu=0.1, rank_budget=3, B_tot=6.0))
    assert capped.effective_rank <= 3


def test_earned_rank_pays_for_itself():
    values = torch.tensor([10.0, 8.0] + [1.0] * 30)
    decay = 2 * math.log(2)
    assert earned_rank(values, decay, 0.5, 32) == 2
    assert earned_rank(values, decay, 0.5, 1) == 1
    assert earned_rank(values, decay, 2.0, 32) == 0
    assert earned_rank(torch.zeros(4), decay, 0.1, 4) == 0
    # Where a bit buys little in the codes, many ranks pay, but not beyond the factors' precision.
    assert earned_rank(values, 1e-3, 0.1, 32) == 32
    assert earned_rank(values, 1e-3, 0.1, 32, precision=1) == 2


# --- inputs ---------------------------------------------------------------------------------


def test_calibration_data_and_diagonal_are_hessians():
    W, X = gaussian(M, N), gaussian(200, N, 5)
    params = small(B_tot=3, mu=1.0)
    from_data = convex_caldera(W, calibration_data=X.view(2, 100, N), params=params)
    from_matrix = convex_caldera(W, X.T @ X / 200, params=params)
    assert torch.equal(from_data.W_compressed, from_matrix.W_compressed)
    diagonal = torch.linspace(1, 9, N, dtype=torch.float64)
    one, two = (convex_caldera(W, H, params=params) for H in (diagonal, torch.diag(diagonal)))
    assert torch.equal(one.W_compressed, two.W_compressed)


def test_result_is_deterministic_and_arguments_are_left_alone(result):
    W, H = weight(), hessian()
    before = W.clone(), H.clone()
    again = convex_caldera_decompose(W, H, small())
    assert torch.equal(W, before[0])
    assert torch.equal(H, before[1])
    assert torch.equal(again.W_compressed, result.W_compressed)


def test_zero_weights_and_singular_hessians_are_fine():
    zero = convex_caldera(torch.zeros(8, 12), params=small())
    assert not zero.W_compressed.any()
    assert zero.relative_error == 0
    x = gaussian(5, N, 3)
    singular = convex_caldera(gaussian(M, N), x.T @ x / 5, params=small(B_tot=3))
    assert 0 < singular.relative_loss < 0.1
    nothing = convex_caldera(gaussian(M, N), torch.zeros(N, N), params=small(B_tot=3))
    assert nothing.relative_error < 0.5


@pytest.mark.slow
def test_low_rank_weight_leaves_a_residual_that_scales_can_hold():
    exact = 0.02 * gaussian(M, PLANTED, 1) @ gaussian(PLANTED, N, 2)
    result = convex_caldera(exact, params=small(B_tot=4))
    assert result.effective_rank == PLANTED
    assert result.relative_error < 1e-3


def test_bad_input_is_refused():
    W = gaussian(M, N)
    with pytest.raises(RecipeError, match="not both"):
        convex_caldera(W, torch.eye(N), torch.ones(4, N))
    with pytest.raises(ShapeError, match="calibration_data"):
        convex_caldera(W, calibration_data=torch.ones(4, N + 1))
    with pytest.raises(NumericalError, match="row 2"):
        convex_caldera(
            W, calibration_data=torch.ones(4, N).index_fill(0, torch.tensor(2), math.nan)
        )
    with pytest.raises(ShapeError, match="non-empty matrix"):
        convex_caldera(torch.zeros(0, 4))
    with pytest.raises(NumericalError, match="weight is nan"):
        convex_caldera(W.index_fill(0, torch.tensor(3), math.nan))
    with pytest.raises(ShapeError):
        convex_caldera(W, torch.eye(N + 1))
