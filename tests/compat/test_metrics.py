"""Figures by definition: everything stored is counted, and nothing is made up."""

import math

import pytest
import torch

from convex_caldera.compat import (
    CalderaParams,
    CompressionMetrics,
    ConvexCalderaParams,
    caldera,
    compute_accuracy_drop,
    compute_bits_per_parameter,
    compute_compression_ratio,
    compute_effective_rank,
    compute_entropy_rank,
    compute_model_size_mb,
    compute_perplexity_increase,
    compute_relative_error,
    compute_relative_loss,
    compute_singular_values,
    compute_stable_rank,
    convex_caldera,
    evaluate_compression,
)
from convex_caldera.errors import DataError, NumericalError, RecipeError, ShapeError
from tests.problems import correlated_hessian, gaussian


def test_metrics_have_their_fields_and_defaults():
    """The original's class could not be imported: fields without default after those with one."""
    metrics = CompressionMetrics(2.0, 0.1, 8.0, 0.5, 3, 2.0, 2.5)
    assert metrics.duality_gap is None
    assert metrics.to_dict()["bits_per_parameter"] == 2.0


def test_sizes_follow_from_bytes():
    assert compute_bits_per_parameter(300, 1200) == 2.0
    assert compute_compression_ratio(300, 1200) == 8.0
    assert compute_compression_ratio(300, 1200, original_bits=32) == 16.0
    assert compute_model_size_mb(1_500_000) == 1.5
    for bad in (lambda: compute_bits_per_parameter(10, 0), lambda: compute_model_size_mb(0)):
        with pytest.raises(DataError):
            bad()


def test_relative_error_of_nothing_is_nothing():
    """Not 2^-(b+1), as the original put where the measured error was tiny."""
    W = gaussian(4, 6)
    assert compute_relative_error(W, W) == 0.0
    assert compute_relative_error(W, W + 1e-12 * W) == pytest.approx(1e-12, rel=1e-3)
    assert compute_relative_error(W, 0 * W) == 1.0
    assert compute_relative_error(0 * W, 0 * W) == 0.0
    assert compute_relative_error(0 * W, W) == math.inf
    with pytest.raises(ShapeError):
        compute_relative_error(W, W.T)


def test_relative_loss_weighs_by_the_hessian():
    W, H = gaussian(4, 6), correlated_hessian(6).matrix
    W_hat = W + 0.1 * gaussian(4, 6, 1)
    E = W - W_hat
    expected = torch.trace(E @ H @ E.T) / torch.trace(W @ H @ W.T)
    assert compute_relative_loss(W, W_hat, H) == pytest.approx(float(expected))
    identity = compute_relative_loss(W, W_hat, torch.ones(6))
    assert identity == pytest.approx(compute_relative_error(W, W_hat) ** 2)
    with pytest.raises(ShapeError):
        compute_relative_loss(W, W_hat, torch.eye(5))


def test_model_figures_are_differences():
    assert compute_accuracy_drop(0.75, 0.70) == pytest.approx(0.05)
    assert compute_perplexity_increase(5.0, 6.5) == 1.5
    with pytest.raises(DataError, match="compressed"):
        compute_accuracy_drop(0.5, math.nan)
    with pytest.raises(DataError, match="at least 1"):
        compute_perplexity_increase(5.0, 0.5)


def test_ranks_of_known_spectra():
    U = torch.linalg.qr(gaussian(6, 6))[0]
    flat = U[:, :3] @ torch.linalg.qr(gaussian(8, 3))[0].T
    for rank in (compute_effective_rank, compute_stable_rank, compute_entropy_rank):
        assert rank(flat) == pytest.approx(3, rel=1e-6)
        assert rank(torch.zeros(3, 4)) == 0
    steep = torch.diag(torch.tensor([10.0, 1.0, 0.1]))
    assert compute_effective_rank(steep) == 3
    assert 1 < compute_stable_rank(steep) < compute_entropy_rank(steep) < 3
    assert compute_singular_values(steep, 2).tolist() == pytest.approx([10.0, 1.0])
    with pytest.raises(ShapeError):
        compute_singular_values(torch.ones(3))
    with pytest.raises(NumericalError):
        compute_singular_values(torch.full((2, 2), math.nan))


def test_evaluation_of_each_kind_of_result():
    W, H = gaussian(16, 24), correlated_hessian(24).matrix
    params = ConvexCalderaParams(num_groups=1, target_rank=1, inner_iters=1)
    result = convex_caldera(W, H, params=params)
    figures = evaluate_compression(
        W, result, H=H, accuracy=(0.8, 0.7), perplexity=(5.0, 5.5), original_bits=32
    )
    assert figures.bits_per_parameter == result.avg_bit_width
    assert figures.relative_error == pytest.approx(result.relative_error, rel=1e-4)
    assert figures.relative_loss == pytest.approx(result.relative_loss, rel=1e-4)
    assert figures.duality_gap == result.duality_gap
    assert figures.effective_rank == 1
    assert figures.compression_ratio == pytest.approx(32 / result.avg_bit_width)
    assert (figures.accuracy_drop, figures.perplexity_increase) == (pytest.approx(0.1), 0.5)
    fitted = caldera(CalderaParams(rank=2, iters=1, L_bits=16, R_bits=16), W, H)
    by_layer = evaluate_compression(W, fitted.layer)
    assert by_layer == evaluate_compression(W, fitted)
    assert by_layer.effective_rank == 2
    assert by_layer.bits_per_parameter > 16 * 2 * (16 + 24) / (16 * 24)
    assert by_layer.duality_gap is None


def test_low_rank_part_is_not_free():
    """The original counted the codes alone."""
    W = gaussian(16, 24)
    with pytest.raises(RecipeError, match="stored_bytes"):
        evaluate_compression(W, W.clone())
    with pytest.raises(RecipeError, match="does not say"):
        evaluate_compression(W, object())
    assert evaluate_compression(W, W.clone(), stored_bytes=96).bits_per_parameter == 2.0
