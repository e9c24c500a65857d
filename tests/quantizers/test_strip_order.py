"""Strips: orders are permutations, undone exactly; structured columns gain from them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from convex_caldera.errors import FormatError, NumericalError, RecipeError, ShapeError
from convex_caldera.quantizers import DoubleScale, NormalFloat, StripOrder, Uniform
from convex_caldera.quantizers.strip_kernels import chain, chain_reference
from tests.examples import examples


def gaussian(m: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def striped(m: int, n: int) -> torch.Tensor:
    """Columns of a few kinds, in a random order that is another one in every strip."""
    kinds = gaussian(m, 4, seed=1) * torch.tensor([0.1, 1.0, 3.0, 10.0])
    return torch.cat(
        [
            kinds[i : i + 16, torch.randint(4, (n,), generator=torch.Generator().manual_seed(i))]
            for i in range(0, m, 16)
        ]
    )


@examples(20)
@given(st.integers(1, 6), st.integers(1, 40), st.integers(0, 10**6))
def test_chain_is_the_greedy_chain(rows: int, n: int, seed: int) -> None:
    part = gaussian(rows, n, seed).numpy()
    order = chain(part)
    assert sorted(order) == list(range(n)) and order[0] == 0
    columns = part.T.astype(np.float64)
    for k in range(1, n):  # each choice is as near as the reference's, up to float32 rounding
        mean = columns[order[max(k - 16, 0) : k]].mean(0)
        distances = ((columns[order[k:]] - mean) ** 2).sum(1)
        assert distances[0] <= distances.min() + 1e-4
    if rows > 2:
        assert np.array_equal(order, chain_reference(part))


@pytest.mark.parametrize("shape", [(16, 32), (33, 19), (1, 1), (5, 2), (40, 130)])
@pytest.mark.parametrize("index_bits", [0, 16])
def test_columns_return_to_their_places(shape: tuple[int, int], index_bits: int) -> None:
    """An inner quantizer without error leaves none behind."""
    W = gaussian(*shape).mul(20).round().clamp(-100, 100)
    quantizer = StripOrder(Uniform(8, -1, search=False), 16, index_bits)
    fitted = quantizer.fit(W)
    codes = fitted.encode(W)
    assert (fitted.decode(codes) - W).abs().max() <= 0.5 * 200 / 255 + 1e-3
    stored = {**fitted.tensors(), "codes": fitted.pack(codes)}
    layout = {name: (t.dtype, tuple(t.shape)) for name, t in stored.items()}
    assert layout == quantizer.layout(shape)
    again = quantizer.restore(shape, fitted.tensors())
    unpacked = again.unpack(stored["codes"])
    assert torch.equal(again.decode(unpacked), fitted.decode(codes))
    assert torch.equal(again.encode(W).long(), codes.long())


def test_sorted_strips_are_coded_better() -> None:
    W = striped(64, 128)
    plain, ordered = (q.fit(W) for q in (Uniform(2, 16), StripOrder(Uniform(2, 16), 16)))
    errors = [(f.decode(f.encode(W)) - W).square().mean() for f in (plain, ordered)]
    assert errors[1] < 0.5 * errors[0]


def test_rows_are_taken_by_whole_strips() -> None:
    W = gaussian(40, 24)
    fitted = StripOrder(DoubleScale(NormalFloat(3, -1), 8), 16).fit(W)
    codes = fitted.encode(W)
    for rows in (slice(16, 32), slice(32, 40)):
        assert torch.equal(fitted.take_rows(rows).decode(codes[rows]), fitted.decode(codes)[rows])
    for rows in (slice(8, 16), slice(0, 8), slice(16, 16)):
        with pytest.raises(ShapeError, match="whole strips"):
            fitted.take_rows(rows)


def test_importance_follows_its_column() -> None:
    """Uniform's search sees the mean importance of each sorted place."""
    W = gaussian(8, 16)
    heavy = torch.ones(16)
    heavy[3] = 1e4
    quantizer = StripOrder(Uniform(2, 0), 8)
    light, weighed = quantizer.fit(W), quantizer.fit(W, importance=heavy)

    def error(fitted: object) -> float:
        return float((fitted.decode(fitted.encode(W)) - W)[:, 3].square().sum())  # type: ignore[attr-defined]

    assert error(weighed) < error(light)


def test_bad_input_is_refused() -> None:
    for options in ({"strip": 0}, {"index_bits": 8}):
        with pytest.raises(RecipeError, match="strip must be positive"):
            StripOrder(Uniform(2), **options)
    with pytest.raises(RecipeError, match="cannot be within"):
        StripOrder(StripOrder(Uniform(2)))
    with pytest.raises(RecipeError, match="cannot be within"):
        DoubleScale(DoubleScale(Uniform(2)))
    with pytest.raises(RecipeError, match="65536"):
        StripOrder(Uniform(2)).layout((4, 70_000))
    W = gaussian(8, 16)
    fitted = StripOrder(Uniform(2, 8), 4).fit(W)
    with pytest.raises(ShapeError, match="whole"):
        fitted.encode(W[:, :8])
    with pytest.raises(NumericalError, match="1 NaN"):
        fitted.encode(
            torch.where(torch.arange(16) + 16 * torch.arange(8)[:, None] == 5, torch.nan, W)
        )
    order = fitted.tensors()["order"].clone()
    order[0] ^= 1
    with pytest.raises(FormatError, match="once in every strip"):
        fitted.quantizer.restore((8, 16), {**fitted.tensors(), "order": order})


def test_tiny_weights_are_refused_by_double_scale() -> None:
    with pytest.raises(NumericalError, match="multiply the weight"):
        DoubleScale(NormalFloat(2, -1)).fit(gaussian(4, 8) * 1e-35)
    for options in ({"group_size": -1}, {"scale_bits": 1}, {"super_group": 0}):
        with pytest.raises(RecipeError):
            DoubleScale(NormalFloat(2, -1), **options)


def test_small_groups_beside_outliers_keep_a_scale() -> None:
    """A plain 8-bit grid would round their scale to zero and lose them."""
    W = gaussian(8, 64)
    W[0, 0] = 1e5
    W[4, :16] = 0
    fitted = DoubleScale(NormalFloat(4, -1), 16).fit(W)
    assert (fitted.grid > 0).sum() == fitted.grid.numel() - 1
    assert not fitted.decode(fitted.encode(W))[4, :16].any()
