"""The source-coding baselines under the mission's names."""

from __future__ import annotations

import math

import pytest
import torch

from convex_caldera import SCLQuantizationParams, scl_quantize
from convex_caldera.errors import NumericalError, RecipeError, ShapeError

# Mean squared error of the best 2^b levels for N(0, 1): Max 1960, table I.
LLOYD_MAX = {1: 0.3634, 2: 0.1175, 3: 0.0345, 4: 0.0095}


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", LLOYD_MAX)
def test_lloyd_max_reaches_the_known_distortion(bits: int) -> None:
    result = scl_quantize(gaussian(512, 1024), SCLQuantizationParams(bits, "lloyd_max"))
    assert result.distortion == pytest.approx(LLOYD_MAX[bits], rel=0.01)
    assert result.rate == bits and result.num_codebook_entries == 2**bits
    assert result.entropy <= result.stored_bits <= bits + 0.01


@pytest.mark.parametrize("method", ["scalar", "scalar_uniform", "lloyd_max"])
def test_scalar_results_explain_themselves(method: str) -> None:
    W = 0.02 * gaussian(3, 40, 50)
    result = scl_quantize(W, SCLQuantizationParams(3, method))  # type: ignore[arg-type]
    assert result.indices.shape == W.shape and result.codebook is not None
    looked_up = result.codebook[result.indices.long(), 0]
    torch.testing.assert_close(looked_up, result.quantized, rtol=1e-6, atol=1e-9)
    assert result.distortion == pytest.approx(float((result.quantized - W).square().mean()), 1e-4)
    assert result.compression_ratio == 16 / result.stored_bits


def test_vectors_are_cut_from_the_flattened_tensor() -> None:
    W = gaussian(37, 21)
    params = SCLQuantizationParams(4, "vector", vector_dim=4)
    result = scl_quantize(W, params)
    assert result.rate == 1.0 and result.codebook is not None
    assert result.indices.shape == (math.ceil(37 * 21 / 4),)
    flat = result.codebook[result.indices.long()].flatten()[: W.numel()].reshape(W.shape)
    torch.testing.assert_close(flat, result.quantized)
    again = scl_quantize(W, params)
    assert torch.equal(again.indices, result.indices)


def test_a_tolerance_ends_iterations_whatever_the_scale_of_the_weights() -> None:
    for unit in (1.0, 1e-3):
        W = unit * gaussian(128, 256)
        loose, default, tight = (
            scl_quantize(W, SCLQuantizationParams(6, "vector", 2, tolerance=tolerance)).distortion
            for tolerance in (0.05, 1e-6, 0.0)
        )
        assert tight <= default <= 1.001 * tight < 0.98 * loose


def test_groups_lower_the_error_of_unequal_rows() -> None:
    W = gaussian(64, 128) * torch.logspace(-2, 0, 64)[:, None]
    errors = [
        scl_quantize(W, SCLQuantizationParams(4, "lloyd_max", group_size=group)).quantized - W
        for group in (-1, 0)
    ]
    quiet = [float(error[:16].square().mean()) for error in errors]
    assert quiet[1] < 0.2 * quiet[0]


def test_metric_and_codebook_size_may_be_chosen() -> None:
    W = gaussian(64, 64)
    four = scl_quantize(W, SCLQuantizationParams(2, "lloyd_max", distortion_metric="mae"))
    assert four.distortion == pytest.approx(float((four.quantized - W).abs().mean()), rel=1e-5)
    other = SCLQuantizationParams(8, "lloyd_max", num_codebook_entries=4)
    assert torch.equal(scl_quantize(W, other).indices, four.indices)


@pytest.mark.parametrize("method", ["scalar", "lloyd_max"])
@pytest.mark.parametrize("value", [0.0, 1.0, -0.25])
def test_constant_tensors_are_kept(method: str, value: float) -> None:
    W = torch.full((8, 9), value)
    result = scl_quantize(W, SCLQuantizationParams(2, method))  # type: ignore[arg-type]
    assert torch.equal(result.quantized, W) and result.distortion == 0.0
    assert result.entropy == 0.0


def test_one_value_is_a_tensor_too() -> None:
    assert scl_quantize(torch.tensor(3.0)).quantized == 3.0
    with pytest.raises(RecipeError, match=r"4 entries .* 1 weights"):
        scl_quantize(torch.tensor(3.0), SCLQuantizationParams(2, "lloyd_max"))


def test_bad_input_gets_one_clear_error() -> None:
    with pytest.raises(ShapeError, match="nothing to quantize"):
        scl_quantize(torch.empty(0, 4))
    W = gaussian(8, 8)
    W[0, 0] = math.nan
    for method in ("scalar", "lloyd_max", "vector"):
        with pytest.raises(NumericalError, match="1 NaN"):
            scl_quantize(W, SCLQuantizationParams(2, method))  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match=r"256 entries .* 64 vectors"):
        scl_quantize(gaussian(16, 16), SCLQuantizationParams(8, "vector", vector_dim=4))
    for wrong in (
        {"method": "cubic"},
        {"num_bits": 9},
        {"num_bits": 0},
        {"vector_dim": 2},
        {"method": "vector", "vector_dim": 0},
        {"distortion_metric": "mape"},
        {"num_codebook_entries": 3},
        {"tolerance": -1.0},
        {"clip_ratio": 0.0},
        {"method": "vector", "max_iterations": 0},
    ):
        with pytest.raises(RecipeError):
            SCLQuantizationParams(**wrong)  # type: ignore[arg-type]
