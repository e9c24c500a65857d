"""T4: LDLQ under a diagonal metric is nearest; it is GPTQ; its loss is sum_j D_j |e_j|^2."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from convex_caldera.core.hessian import Hessian
from convex_caldera.core.problem import Problem
from convex_caldera.fit.rounding import refine, round_ldlq, round_nearest, round_two_sided
from convex_caldera.linalg.factor import block_unit_upper
from convex_caldera.quantizers.e8p import E8P
from convex_caldera.quantizers.uniform import Uniform
from tests.examples import examples
from tests.oracles.gptq import gptq_codes
from tests.oracles.toy import Grid
from tests.problems import correlated_hessian, gaussian

SIZES = st.tuples(st.integers(1, 9), st.integers(1, 40), st.integers(0, 2**31))


@given(SIZES)
@examples(30)
def test_ldlq_under_a_diagonal_metric_is_nearest(size):
    m, n, seed = size
    W = gaussian(m, n, seed)
    fitted = Grid().fit(W)
    H = torch.diag(torch.rand(n, dtype=torch.float64) + 0.1)
    codes, _ = round_ldlq(W, fitted, block_unit_upper(H, 1))
    assert torch.equal(codes, round_nearest(W, fitted)[0])


@given(SIZES)
@examples(30)
def test_ldlq_codes_equal_gptq_codes(size):
    m, n, seed = size
    W, hessian = gaussian(m, n, seed), correlated_hessian(n, seed % 1000)
    fitted = Grid().fit(W)
    codes, _ = round_ldlq(W, fitted, hessian.unit_upper(1))
    assert torch.equal(codes, gptq_codes(W, hessian.damped, fitted))


@given(SIZES, st.sampled_from([1, 4, 8]))
@examples(30)
def test_ldlq_loss_is_the_blockwise_sum_of_rounding_errors(size, block):
    m, n, seed = size
    W, hessian = gaussian(m, n, seed), correlated_hessian(n, seed % 1000)
    fitted = Grid(block=block).fit(W)
    U = hessian.unit_upper(block)
    _, W_hat = round_ldlq(W, fitted, U)
    D = torch.linalg.solve(U, torch.linalg.solve(U, hessian.damped).T)
    e = (W - W_hat) @ U
    assert float(e.abs().max()) <= 0.25 + 1e-9  # every block was rounded to the nearest
    damped = Problem(W, Hessian(hessian.damped, 0.0))
    assert abs(damped.loss(W_hat) - float(((e @ D) * e).sum())) <= 1e-8 * (1 + damped.loss(W_hat))


def test_ldlq_panels_do_not_change_codes(monkeypatch):
    W, hessian = gaussian(6, 70, 1), correlated_hessian(70)
    fitted = Grid(block=4).fit(W)
    whole = round_ldlq(W, fitted, hessian.unit_upper(4))[0]
    monkeypatch.setattr("convex_caldera.fit.rounding.PANEL", 8)
    assert torch.equal(round_ldlq(W, fitted, hessian.unit_upper(4))[0], whole)


@pytest.mark.parametrize(("bits", "n"), [(2, 264), (3, 141), (4, 144)])
def test_compiled_panels_are_the_plain_loop(monkeypatch, bits, n):
    W, hessian = gaussian(12, n, bits).float(), correlated_hessian(n)
    fitted, H = E8P(bits).fit(W), hessian.damped
    rounded = round_ldlq(W, fitted, hessian.unit_upper(8))
    refined = refine(W, *rounded, fitted, H, 2)
    monkeypatch.setattr("convex_caldera.fit.rounding._for_kernels", lambda x: False)
    plain = round_ldlq(W, fitted, hessian.unit_upper(8))
    for (codes, values), expected in (
        (rounded, plain[0]),
        (refined, refine(W, *rounded, fitted, H, 2)[0]),
    ):
        assert (codes != expected).float().mean() < 0.02  # sums in another order
        assert torch.allclose(values, fitted.decode(codes), atol=1e-5)


@given(SIZES)
@examples(20)
def test_scalar_refinement_never_raises_the_loss(size):
    m, n, seed = size
    W, hessian = gaussian(m, n, seed), correlated_hessian(n, seed % 1000)
    fitted = Grid().fit(W)
    problem = Problem(W, Hessian(hessian.damped, 0.0))
    codes, W_hat = round_ldlq(W, fitted, hessian.unit_upper(1))
    before = problem.loss(W_hat)
    for _ in range(3):
        codes, W_hat = refine(W, codes, W_hat, fitted, hessian.damped, 1)
        assert problem.loss(W_hat) <= before * (1 + 1e-9)
        before = problem.loss(W_hat)
    assert torch.allclose(fitted.decode(codes), W_hat)


def test_inputs_are_left_alone():
    W, hessian = gaussian(4, 16), correlated_hessian(16)
    fitted, kept = Grid().fit(W), W.clone()
    codes, W_hat = round_ldlq(W, fitted, hessian.unit_upper(1))
    kept_codes = codes.clone()
    refine(W, codes, W_hat, fitted, hessian.damped, 2)
    assert torch.equal(W, kept) and torch.equal(codes, kept_codes)


@given(SIZES, st.sampled_from([1, 4]), st.sampled_from([1, 3, 16]))
@examples(20)
def test_two_sided_rounding_with_identity_outputs_is_ldlq(size, block, rows):
    m, n, seed = size
    W, hessian = gaussian(m, n, seed), correlated_hessian(n, seed % 1000)
    fitted, U = Grid(block=block).fit(W), hessian.unit_upper(block)
    eye = torch.eye(m, dtype=torch.float64)
    codes, W_hat = round_two_sided(W, fitted, U, eye, rows)
    assert torch.equal(codes, round_ldlq(W, fitted, U)[0])
    assert torch.allclose(fitted.decode(codes), W_hat)


@given(SIZES, st.sampled_from([1, 4]), st.sampled_from([1, 3]))
@examples(20)
def test_two_sided_loss_is_the_tilewise_sum_of_rounding_errors(size, block, rows):
    m, n, seed = size
    W, hessian = gaussian(m, n, seed), correlated_hessian(n, seed % 1000)
    output = correlated_hessian(m, seed % 997)
    U, P = hessian.unit_upper(block), output.unit_upper(rows)
    _, W_hat = round_two_sided(W, Grid(block=block).fit(W), U, P, rows)
    e = P.T @ (W - W_hat) @ U
    assert float(e.abs().max()) <= 0.25 + 1e-9  # every tile was rounded to the nearest
    D = torch.linalg.solve(U, torch.linalg.solve(U, hessian.damped).T)
    C = torch.linalg.solve(P, torch.linalg.solve(P, output.damped).T)
    damped = Problem(W, Hessian(hessian.damped, 0.0), output=Hessian(output.damped, 0.0))
    expected = float(((C @ e) * (e @ D)).sum())
    assert abs(damped.loss(W_hat) - expected) <= 1e-8 * (1 + expected)


def test_tiles_with_scales_of_their_own_are_coded_where_they_lie():
    W, hessian = gaussian(40, 36, 3).float(), correlated_hessian(36)
    output = correlated_hessian(40, 5)
    fitted = Uniform(3, 16).fit(W)
    codes, W_hat = round_two_sided(W, fitted, hessian.unit_upper(1), output.unit_upper(16), 16)
    assert torch.allclose(fitted.decode(codes), W_hat, atol=1e-5)
