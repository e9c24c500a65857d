"""Laws of the streamed second moments."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from convex_caldera.calibrate.statistics import (
    InputAccumulator,
    InputStatistics,
    pack_symmetric,
    unpack_symmetric,
)
from convex_caldera.errors import DataError, FormatError, NumericalError, ShapeError

# Stored in float32: half a unit in the last place, relative to the diagonal.
_STORED = 2e-7


def _inputs(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


@given(rows=st.integers(1, 40), width=st.integers(1, 9), cuts=st.lists(st.integers(1, 39)))
def test_accumulator_is_the_mean_over_tokens_however_cut(rows, width, cuts):
    x = _inputs(rows, width)
    accumulator = InputAccumulator("site", width)
    edges = sorted({0, rows, *(cut for cut in cuts if cut < rows)})
    for start, stop in pairwise(edges):
        accumulator.add(x[start:stop], range(start, stop))
    statistics = accumulator.finish()
    H = x.double().T @ x.double() / rows
    error = (statistics.second_moment() - H).abs().max()
    assert error <= _STORED * 4 * H.diagonal().max()
    torch.testing.assert_close(statistics.mean_abs, x.abs().mean(0), rtol=1e-6, atol=0)
    assert statistics.num_tokens == rows


def test_accumulator_keeps_small_tokens_beside_many():
    """Float64 sums: 2000 batches of ones do not swallow one of 1e-3."""
    accumulator = InputAccumulator("site", 2)
    for _ in range(2000):
        accumulator.add(torch.ones(64, 2), range(1))
    accumulator.add(torch.full((64, 2), 1e-3), range(1))
    total = accumulator._second[0, 0].item()
    assert total - 2000 * 64 == pytest.approx(64e-6, rel=1e-3)


def test_accumulator_flattens_samples_and_tokens():
    x = _inputs(12, 5)
    flat, nested = InputAccumulator("site", 5), InputAccumulator("site", 5)
    flat.add(x, range(3))
    nested.add(x.view(3, 4, 5), range(3))
    assert torch.equal(flat.finish().packed, nested.finish().packed)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("sample", [0, 2])
def test_accumulator_names_the_first_bad_sample(value, sample):
    x = _inputs(12, 5).view(3, 4, 5)
    x[sample, 1, 3] = value
    x[2, 3, 4] = value
    accumulator = InputAccumulator("model.layers.7.mlp.up_proj", 5)
    with pytest.raises(NumericalError, match=rf"layers\.7\.mlp\.up_proj.*sample {sample + 16}, ch"):
        accumulator.add(x, range(16, 19))
    assert accumulator.num_tokens == 0


def test_accumulator_refuses_squares_beyond_float32():
    accumulator = InputAccumulator("site", 2)
    with pytest.raises(NumericalError, match=r"exceed float32 in samples 4 to 5"):
        accumulator.add(torch.full((2, 2), 1e20), range(4, 6))


def test_accumulator_refuses_other_widths_and_no_tokens():
    accumulator = InputAccumulator("site", 4)
    with pytest.raises(ShapeError, match="expected width 4"):
        accumulator.add(torch.ones(2, 5), range(2))
    with pytest.raises(DataError, match="no token"):
        accumulator.finish()


@given(width=st.integers(1, 12))
def test_packing_is_lossless(width):
    x = _inputs(20, width)
    H = x.T @ x
    packed = pack_symmetric(H)
    assert packed.shape == (width * (width + 1) // 2,)
    rows, columns = torch.tril_indices(width, width)
    assert torch.equal(packed, H[rows, columns])
    assert torch.equal(unpack_symmetric(packed, width), H.tril() + H.tril(-1).T)


def test_statistics_restore_and_hessian():
    accumulator = InputAccumulator("site", 6)
    x = _inputs(30, 6)
    x[:, 2] = 0
    accumulator.add(x, range(30))
    statistics = accumulator.finish()
    again = InputStatistics.restore("site", statistics.tensors(), 30)
    H, H_again = statistics.hessian(0.05), again.hessian(0.05)
    assert torch.equal(H.matrix, H_again.matrix) and H.matrix.dtype == torch.float64
    assert H.damping == 0.05 and H.name == "site"
    assert torch.equal(H.statistics["mean_abs"], statistics.mean_abs.double())
    assert H.dead.tolist() == [channel == 2 for channel in range(6)]


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"packed": torch.ones(3)},
        {"packed": torch.ones(4), "mean_abs": torch.ones(2)},
        {"packed": torch.ones(3), "mean_abs": torch.ones(2, 1)},
        {"packed": torch.ones(3).double(), "mean_abs": torch.ones(2)},
    ],
)
def test_statistics_that_do_not_fit_are_refused(tensors):
    with pytest.raises(FormatError):
        InputStatistics.restore("site", tensors, 3)
