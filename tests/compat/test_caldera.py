"""`caldera` under its original names: the mission's example runs with its imports changed."""

import pytest
import torch

from convex_caldera.compat import CalderaParams, QuantizerFactory, QuIPArgs, caldera
from convex_caldera.core.terms import Coded, Dense, LowRank
from convex_caldera.errors import RecipeError
from tests.problems import correlated_hessian, gaussian

M, N = 32, 48


def weight():
    return gaussian(M, N) + gaussian(M, 3, 1) @ gaussian(3, N, 2)


def relative_loss(W, W_hat, H):
    E = W - W_hat.double()
    return float(((E @ H) * E).sum()) / float(((W @ H) * W).sum())


def test_example_of_the_mission():
    quant_factory_Q = QuantizerFactory(method="uniform", block_size=64)
    quant_factory_LR = QuantizerFactory(method="uniform", block_size=64)
    quant_params = CalderaParams(
        compute_quantized_component=True,
        compute_low_rank_factors=True,
        Q_bits=2,
        L_bits=16,
        R_bits=16,
        rank=8,
        iters=5,
        lplr_iters=5,
        activation_aware_LR=True,
        update_order=["Q", "LR"],
        quant_factory_Q=quant_factory_Q,
        quant_factory_LR=quant_factory_LR,
    )
    W = weight()
    H = torch.eye(W.shape[1])
    caldera_decom = caldera(quant_params=quant_params, W=W, H=H, device="cpu", use_tqdm=True)
    W_compressed = caldera_decom.Q + caldera_decom.L @ caldera_decom.R
    torch.testing.assert_close(W_compressed, caldera_decom.weight(), atol=1e-5, rtol=1e-5)
    loss = relative_loss(W, W_compressed, H.double())
    assert loss == pytest.approx(caldera_decom.relative_loss, rel=1e-4)
    assert loss < 0.06
    assert len(caldera_decom.errors["Q"]) == len(caldera_decom.errors["LR"]) == 5


def test_defaults_never_return_zeros():
    fit = caldera(CalderaParams(rank=4, iters=1), weight(), correlated_hessian(N).matrix)
    assert fit.Q.abs().max() > 0
    assert (fit.L @ fit.R).abs().max() > 0
    assert fit.relative_loss < 0.1


def test_arguments_are_not_changed():
    """The original rescales W in place, so that its later errors are measured on another W."""
    W, H = weight(), correlated_hessian(N).matrix
    before = W.clone(), H.clone()
    params = CalderaParams(compute_low_rank_factors=False, iters=3)
    fit = caldera(params, W, H)
    assert torch.equal(W, before[0])
    assert torch.equal(H, before[1])
    assert not params.update_order
    assert fit.relative_loss == pytest.approx(relative_loss(W, fit.weight(), H), rel=1e-4)


def test_default_objects_are_not_shared():
    assert CalderaParams().quip_args is not CalderaParams().quip_args
    assert CalderaParams().update_order is not CalderaParams().update_order


def test_rotation_gives_the_matrix_itself():
    H = correlated_hessian(N).matrix
    params = CalderaParams(rank=4, iters=2, hadamard_transform=True, Q_hessian_downdate=True)
    fit = caldera(params, weight(), H)
    assert fit.relative_loss == pytest.approx(relative_loss(weight(), fit.weight(), H), rel=1e-4)
    assert fit.relative_loss < 0.1


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ({"compute_low_rank_factors": False}, (Coded,)),
        ({"compute_quantized_component": False, "rank": 3}, (LowRank,)),
        ({"update_order": ["Q", "LR"], "rank": 3}, (Coded, LowRank)),
        ({"update_order": ["LR", "Q"], "rank": 3}, (LowRank, Coded)),
    ],
)
def test_terms_follow_the_order_asked_for(options, kinds):
    fit = caldera(CalderaParams(iters=1, **options), weight())
    assert tuple(type(term) for term in fit.layer.terms) == kinds


@pytest.mark.parametrize("method", ["uniform", "uniform_clipped", "normal"])
def test_scalar_quantizers_work_in_their_blocks(method):
    factory = QuantizerFactory(method, block_size=16)
    params = CalderaParams(
        rank=2, iters=2, L_bits=16, R_bits=16, activation_aware_Q=False, lattice_quant_Q=False,
        Q_bits=4, quant_factory_Q=factory,
    )  # fmt: skip
    fit = caldera(params, weight())
    codes = fit.layer.terms[1]
    assert codes.fitted.tensors()["scales"].shape == (M, N // 16)
    assert fit.relative_loss < 0.02


def test_factors_are_coded_below_sixteen_bits():
    low = caldera(CalderaParams(rank=3, iters=1, L_bits=4, R_bits=4), weight()).layer.terms[0]
    assert isinstance(low.left, Coded)
    dense = caldera(CalderaParams(rank=3, iters=1, L_bits=16, R_bits=16), weight()).layer.terms[0]
    assert isinstance(dense.left, Dense)
    assert low.stored_bytes() < dense.stored_bytes() / 3


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (CalderaParams(update_order=["X"]), "may hold"),
        (CalderaParams(L_bits=4, R_bits=2), "must be equal"),
        (
            CalderaParams(compute_quantized_component=False, compute_low_rank_factors=False),
            "neither",
        ),
        (CalderaParams(activation_aware_Q=False, lattice_quant_Q=False,
                       quant_factory_Q=QuantizerFactory("cubic")), "unknown quantizer"),
    ],
)  # fmt: skip
def test_contradictions_are_refused(params, message):
    with pytest.raises(RecipeError, match=message):
        caldera(params, weight())


def test_codebook_scale_override_is_used():
    plain = caldera(CalderaParams(compute_low_rank_factors=False, iters=1), weight())
    scaled = CalderaParams(
        compute_low_rank_factors=False, iters=1, quip_args=QuIPArgs(scale_override=0.9)
    )
    ratio = (
        caldera(scaled, weight()).layer.terms[0].fitted.scale / plain.layer.terms[0].fitted.scale
    )
    assert float(ratio) == pytest.approx(1.03 / 0.9, rel=1e-5)
