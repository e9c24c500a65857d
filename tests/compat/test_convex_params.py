"""Every field of ConvexCalderaParams does what it says, or is refused."""

import logging

import pytest
import torch

from convex_caldera.compat import ConvexCalderaParams, convex_caldera
from convex_caldera.compat.convex_groups import column_groups, formats
from convex_caldera.core.terms import Coded, Dense
from convex_caldera.errors import RecipeError
from tests.examples import first
from tests.problems import correlated_hessian, gaussian

M, N = 32, 48


def compress(**options):
    params = ConvexCalderaParams(**{"num_groups": 2, "inner_iters": 1, "rank_budget": 0, **options})
    return convex_caldera(gaussian(M, N), correlated_hessian(N).matrix, params=params)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("solver", "SCS", "only 'structured'"),
        ("tolerance", 0.01, "no step stops"),
        ("apply_qat", True, "training"),
        ("B_tot", 0.0, "B_tot"),
        ("B_tot", float("nan"), "B_tot"),
        ("b_min", 9.0, "b_min <= b_max"),
        ("mu", -1.0, "mu"),
        ("tau_star", float("inf"), "tau_star"),
        ("kappa", 0.0, "kappa"),
        ("k", -1.0, "k must"),
        ("solver_tol", 0.0, "solver_tol"),
        ("discrete_bits", (2, 9), "1 to 8 bits"),
        ("discrete_bits", (1,), "none of discrete_bits"),
        ("Q_bits", 12, "1 to 8 bits"),
        ("factor_bits", 8, "quantize_factors"),
        ("L_bits", 1, "L_bits"),
        ("rank_budget", -1, "rank_budget"),
        ("num_groups", 0, "num_groups"),
        ("inner_iters", 0, "inner_iters"),
    ],
)
def test_field_that_cannot_hold_is_refused(field, value, message):
    with pytest.raises(RecipeError, match=message):
        ConvexCalderaParams(**{field: value})


def test_fields_assigned_later_are_checked_at_use():
    params = ConvexCalderaParams()
    params.solver = "MOSEK"
    with pytest.raises(RecipeError, match="MOSEK"):
        convex_caldera(gaussian(M, N), params=params)


def test_bits_on_offer_lie_in_the_range():
    assert ConvexCalderaParams().widths == (2, 3, 4, 8)
    assert ConvexCalderaParams(b_max=16).widths == (2, 3, 4, 8, 16)
    assert ConvexCalderaParams(b_min=3, b_max=4).widths == (3, 4)
    assert ConvexCalderaParams(Q_bits=5).widths == (5,)


def test_factor_bits_are_those_of_the_field_that_names_the_factor():
    plain = ConvexCalderaParams()
    assert (plain.left_bits, plain.right_bits) == (16, 16)
    both = ConvexCalderaParams(quantize_factors=True, factor_bits=4, R_bits=8)
    assert (both.left_bits, both.right_bits) == (4, 8)


@pytest.mark.parametrize(("left", "right"), first(2, [(8, 4), (16, 8), (8, 8), (3, 3), (5, 16)]))
def test_factors_are_stored_in_the_bits_asked_for(left, right):
    W = gaussian(M, N) + 3 * gaussian(M, 2, 1) @ gaussian(2, N, 2)
    params = ConvexCalderaParams(L_bits=left, R_bits=right, target_rank=2, num_groups=1)
    low_rank = convex_caldera(W, params=params).low_rank
    for factor, bits, size in ((low_rank.left, left, M), (low_rank.right, right, N)):
        assert isinstance(factor, Dense if bits == 16 else Coded)
        codes = 2 * size * bits / 8
        assert codes <= factor.stored_bytes() <= codes + 8


def test_pinned_bits_are_used():
    result = compress(Q_bits=3, B_tot=5.0)
    assert result.b_discrete == [3, 3]
    assert result.b_star == [3.0, 3.0]


def test_float16_groups_are_offered():
    result = compress(discrete_bits=(16,), b_max=16, B_tot=16.0)
    assert all(isinstance(part, Dense) for part in result.parts)
    assert result.avg_bit_width == 16
    assert result.relative_error < 1e-3


def test_one_bit_codes_have_two_levels():
    result = compress(discrete_bits=(1,), b_min=1, B_tot=1.9, per_channel=True)
    for part in result.parts:
        assert all(len(row.abs().unique()) == 1 for row in part.decode())
    assert result.relative_error < 0.8


def test_per_channel_scales_are_one_a_row():
    result = compress(per_channel=True)
    assert [tuple(scale.shape) for scale in result.group_info["delta"]] == [(M, 1), (M, 1)]
    assert {how.scales for how in formats((2, 3), 256, per_channel=True)} == {0}
    assert {how.scales for how in formats((2, 3), 256, per_channel=False)} == {-1, 0, 128, 64}


@pytest.mark.parametrize(("count", "widths"), [(1, [48]), (5, [10, 10, 10, 10, 8]), (90, [1] * 48)])
def test_groups_cover_all_columns(count, widths):
    groups = column_groups(correlated_hessian(N), count).groups
    assert [group.width for group in groups] == widths
    assert groups[0].place.start == 0
    assert groups[-1].place.stop == N


def test_given_constants_are_used():
    info = compress(k=1.0, kappa=7.0).group_info["groups"]
    assert {(group["k"], group["kappa"], group["k_source"]) for group in info} == {
        (1.0, 7.0, "given")
    }
    fitted = compress().group_info["groups"]
    assert all(1.0 < group["k"] < 1.6 and group["k_source"] == "fitted" for group in fitted)


def test_more_alternations_never_lose():
    W = gaussian(M, N) + 3 * gaussian(M, 2, 1) @ gaussian(2, N, 2)
    losses = [
        convex_caldera(
            W, params=ConvexCalderaParams(inner_iters=i, target_rank=2, num_groups=2)
        ).relative_loss
        for i in (1, 4)
    ]
    assert losses[1] <= losses[0]


def test_verbose_solver_reports_to_the_log(caplog):
    with caplog.at_level(logging.INFO, logger="convex_caldera"):
        compress(B_tot=3.0)
        assert not caplog.records
        compress(B_tot=3.0, solver_verbose=True)
    assert "gap" in caplog.records[0].getMessage()


@pytest.mark.parametrize(("m", "n"), first(1, [(24, 40), (40, 64)]))
def test_mission_driver_call_keeps_an_honest_budget(m, n):
    """The arguments of the original's example driver: the low-rank part is no longer free."""
    params = ConvexCalderaParams(
        mu=0.1, target_rank=12, L_bits=8, R_bits=8, B_tot=2.0, b_min=1,
        discrete_bits=[1, 2, 3, 4, 8],
    )  # fmt: skip
    result = convex_caldera(
        torch.randn(m, n, generator=torch.Generator().manual_seed(0)), params=params
    )
    assert result.avg_bit_width <= 2.0
    assert result.effective_rank <= 12
    assert result.relative_error < 1
