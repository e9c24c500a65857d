"""What each transform does beyond the common laws."""

import pytest
import torch

from convex_caldera.core.hessian import Hessian
from convex_caldera.core.problem import Problem
from convex_caldera.errors import FormatError, RecipeError
from convex_caldera.transforms import ActOrder, ColumnScale, Diagonal, RandomizedHadamard
from convex_caldera.transforms.hadamard import pack_signs, unpack_signs

NAMES = {"seed": 0, "layer": "layer", "site": "site"}


def test_signs_are_packed_by_the_documented_order() -> None:
    signs = torch.tensor([1.0, -1, 1, 1, 1, 1, 1, -1, -1])
    packed = pack_signs(signs)
    assert packed.tolist() == [2 + 128, 1]
    assert packed.dtype == torch.uint8
    assert torch.equal(unpack_signs(packed, 9), signs)


def test_stray_sign_bits_are_refused() -> None:
    with pytest.raises(FormatError, match="beyond the 9 channels"):
        unpack_signs(torch.tensor([0, 2], dtype=torch.uint8), 9)


def test_hadamard_signs_are_pinned() -> None:
    # Part of "same input, same bytes": SHA-256 of "7|s|input_signs|0" and "7|l|output_signs|0".
    fitted = RandomizedHadamard().fit(
        torch.zeros(12, 20), Hessian.identity(20), seed=7, layer="l", site="s"
    )
    stored = {name: bits.tolist() for name, bits in fitted.tensors().items()}
    assert stored == {"input_signs": [20, 90, 6], "output_signs": [199, 11]}


def test_hadamard_costs_one_bit_a_channel() -> None:
    fitted = RandomizedHadamard().fit(torch.zeros(96, 288), Hessian.identity(288), **NAMES)
    assert sum(t.numel() * t.element_size() for t in fitted.tensors().values()) == (96 + 288) // 8


def test_hadamard_draws_outputs_by_layer_and_inputs_by_site() -> None:
    W, hessian = torch.zeros(64, 64), Hessian.identity(64)
    one, two = (
        RandomizedHadamard().fit(W, hessian, seed=0, layer=name, site=name) for name in ("a", "b")
    )
    assert not torch.equal(one.tensors()["input_signs"], two.tensors()["input_signs"])
    assert not torch.equal(one.tensors()["output_signs"], two.tensors()["output_signs"])
    assert not torch.equal(one.tensors()["input_signs"], one.tensors()["output_signs"])


def test_hadamard_spreads_an_outlier() -> None:
    W = torch.zeros(96, 288)
    W[3, 5] = 1.0
    inner = RandomizedHadamard().fit(W, Hessian.identity(288), **NAMES).apply(W)
    assert torch.allclose(inner.abs(), torch.full_like(inner, (96 * 288) ** -0.5), rtol=1e-4)


def test_hadamard_accepts_a_rank_one_hessian() -> None:
    # Rotated zeros may come out as -1e-17 on the diagonal, which is rounding, not an error.
    x = torch.ones(16, 1).double()
    for seed in range(8):
        fitted = RandomizedHadamard().fit(
            torch.zeros(2, 16), Hessian(x @ x.T), seed=seed, layer="l", site="s"
        )
        rotated = fitted.apply_hessian(Hessian(x @ x.T))
        assert rotated.matrix.trace().item() == pytest.approx(16.0)


def test_hadamard_drops_statistics_of_single_channels() -> None:
    hessian = Hessian(torch.eye(8), statistics={"mean_abs": torch.ones(8)})
    fitted = RandomizedHadamard().fit(torch.zeros(4, 8), hessian, **NAMES)
    assert fitted.apply_hessian(hessian).statistics == {}


def test_scale_one_equalizes_the_channels() -> None:
    H = torch.diag(torch.tensor([1.0, 4.0, 16.0]).double())
    fitted = ColumnScale(exponent=1.0).fit(torch.zeros(2, 3), Hessian(H), **NAMES)
    # sqrt(H_jj) / mean = [1, 2, 4] * 3 / 7, rounded to float16
    assert torch.allclose(fitted.scale.double(), torch.tensor([3.0, 6, 12]).double() / 7, rtol=1e-3)
    diagonal = fitted.apply_hessian(Hessian(H)).matrix.diagonal()
    assert torch.allclose(diagonal, diagonal.mean().expand(3), rtol=2e-3)


def test_scale_zero_changes_nothing() -> None:
    hessian = Hessian(torch.diag(torch.tensor([1.0, 4.0, 16.0])))
    fitted = ColumnScale(exponent=0.0).fit(torch.zeros(2, 3), hessian, **NAMES)
    assert torch.equal(fitted.scale, torch.ones(3, dtype=torch.float16))


def test_scale_stays_normal_in_float16_for_extreme_channels() -> None:
    diagonal = torch.zeros(500, dtype=torch.float64)
    diagonal[7] = 1e12
    hessian = Hessian(torch.diag(diagonal))
    scale = ColumnScale(exponent=1.0).fit(torch.zeros(1, 500), hessian, **NAMES).scale.float()
    assert torch.isfinite(scale).all()
    assert scale.min() >= torch.finfo(torch.float16).tiny


def test_scale_without_its_statistic_says_so() -> None:
    with pytest.raises(RecipeError, match="not collected for site"):
        ColumnScale(statistic="mean_abs").fit(torch.zeros(2, 3), Hessian.identity(3), **NAMES)


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_scale_refuses_what_cannot_be_undone(value: float) -> None:
    scale = torch.tensor([1.0, value, 1.0], dtype=torch.float16)
    with pytest.raises(FormatError, match=r"scale\[1\]"):
        ColumnScale().restore((2, 3), {"scale": scale})


def test_act_order_is_descending_and_stable() -> None:
    hessian = Hessian(torch.diag(torch.tensor([2.0, 5.0, 2.0, 0.0, 5.0])))
    fitted = ActOrder().fit(torch.zeros(1, 5), hessian, **NAMES)
    assert fitted.tensors()["order"].tolist() == [1, 4, 0, 2, 3]
    assert fitted.tensors()["order"].dtype == torch.uint16


def test_act_order_carries_statistics_along() -> None:
    statistics = {"mean_abs": torch.tensor([1.0, 2.0, 3.0])}
    hessian = Hessian(torch.diag(torch.tensor([1.0, 3.0, 2.0])), statistics=statistics)
    fitted = ActOrder().fit(torch.zeros(1, 3), hessian, **NAMES)
    assert fitted.apply_hessian(hessian).statistics["mean_abs"].tolist() == [2.0, 3.0, 1.0]


def test_act_order_refuses_what_is_no_permutation() -> None:
    with pytest.raises(FormatError, match="each of 3 once"):
        ActOrder().restore((1, 3), {"order": torch.tensor([0, 2, 2]).to(torch.uint16)})


def test_act_order_needs_four_bytes_only_beyond_65536_channels() -> None:
    assert ActOrder().layout((1, 2**16)) == {"order": (torch.uint16, (2**16,))}
    assert ActOrder().layout((1, 2**16 + 1)) == {"order": (torch.uint32, (2**16 + 1,))}


def tuned_diagonal(m: int, n: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Entries of both signs between 1/2 and 3/2, as fine-tuning may leave them."""
    rng = torch.Generator().manual_seed(seed)
    sides = {"input_diagonal": n, "output_diagonal": m}
    sign = {name: 1 - 2 * (torch.rand(k, generator=rng) < 0.1).half() for name, k in sides.items()}
    return {
        name: ((torch.rand(k, generator=rng) + 0.5).half() * sign[name])
        for name, k in sides.items()
    }


def test_tuned_diagonal_scales_rows_and_columns() -> None:
    tensors = tuned_diagonal(5, 7)
    fitted = Diagonal().restore((5, 7), tensors)
    W = torch.randn(5, 7, generator=torch.Generator().manual_seed(1)).double()
    a, b = (tensors[name].double() for name in ("input_diagonal", "output_diagonal"))
    assert torch.allclose(fitted.invert(W), torch.diag(b) @ W @ torch.diag(a), atol=1e-14)
    assert torch.allclose(fitted.apply(fitted.invert(W)), W, atol=1e-14)
    x = torch.randn(3, 7, generator=torch.Generator().manual_seed(2)).double()
    assert torch.allclose(fitted.outputs(fitted.inputs(x) @ W.T), x @ fitted.invert(W).T)


def test_tuned_diagonal_preserves_the_two_sided_loss() -> None:
    rng = torch.Generator().manual_seed(3)
    W, W_hat = torch.randn(2, 5, 7, generator=rng).double()
    X, Y = (torch.randn(30, k, generator=rng).double() for k in (7, 5))
    hessian, output = Hessian(X.T @ X / 30), Hessian(Y.T @ Y / 30)
    fitted = Diagonal().restore((5, 7), tuned_diagonal(5, 7))
    inner = Problem(
        fitted.apply(W), fitted.apply_hessian(hessian), "W", fitted.apply_output(output)
    )
    loss = Problem(W, hessian, "W", output).loss(W_hat)
    assert inner.loss(fitted.apply(W_hat)) == pytest.approx(loss, rel=1e-10)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_impossible_diagonals_are_refused(value: float) -> None:
    tensors = tuned_diagonal(5, 7)
    tensors["output_diagonal"][2] = value
    with pytest.raises(FormatError, match=r"output_diagonal\[2\]"):
        Diagonal().restore((5, 7), tensors)
