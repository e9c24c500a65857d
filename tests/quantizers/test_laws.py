"""The laws every quantizer obeys; those of `tests.quantizers_tried`."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from convex_caldera import quantizers
from convex_caldera.core.protocols import FittedQuantizer, Quantizer, RateLimited
from convex_caldera.errors import FormatError, NumericalError, RecipeError, ShapeError
from convex_caldera.quantizers import E8P
from tests.examples import examples
from tests.quantizers_tried import EXAMPLES

# a two-stage search is not exhaustive, a tail-biting trellis searches by a heuristic
EXACT = [
    q
    for q in EXAMPLES
    if q.kind
    in ("uniform", "normal_float", "mxint", "minifloat", "kmeans", "lloyd_max", "clipped_uniform")
    or q == E8P(2)
]
SHAPES = [(16, 32), (5, 19), (1, 1), (3, 8), (33, 1)]

every = pytest.mark.parametrize("quantizer", EXAMPLES, ids=str)
every_exact = pytest.mark.parametrize("quantizer", EXACT, ids=str)


def gaussian(m: int, n: int, seed: int = 0) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def stored(fitted: FittedQuantizer, codes: Tensor) -> dict[str, tuple[torch.dtype, tuple]]:
    tensors = {**fitted.tensors(), "codes": fitted.pack(codes)}
    return {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}


def test_table_lists_every_kind() -> None:
    assert all(quantizers.TABLE[kind].kind == kind for kind in quantizers.TABLE)
    assert {q.kind for q in EXAMPLES} <= set(quantizers.TABLE)


@every
def test_protocol_shapes_and_packing_are_lossless(quantizer: Quantizer) -> None:
    for shape in SHAPES:
        W = gaussian(*shape)
        fitted = quantizer.fit(W)
        assert isinstance(quantizer, Quantizer) and isinstance(fitted, FittedQuantizer)
        codes = fitted.encode(W)
        assert codes.dim() == 2 and not codes.is_floating_point()
        decoded = fitted.decode(codes)
        assert decoded.shape == W.shape and decoded.dtype == torch.float32
        assert torch.equal(fitted.unpack(fitted.pack(codes)).long(), codes.long()), shape
        assert stored(fitted, codes) == quantizer.layout(shape)


@every
def test_restore_decodes_bit_for_bit(quantizer: Quantizer) -> None:
    for shape in SHAPES:
        W = gaussian(*shape)
        fitted = quantizer.fit(W)
        codes = fitted.encode(W)
        restored = quantizer.restore(shape, {k: t.clone() for k, t in fitted.tensors().items()})
        again = restored.unpack(fitted.pack(codes))
        assert torch.equal(restored.decode(again), fitted.decode(codes)), shape
        if not isinstance(quantizer, RateLimited):  # whose cells are not stored
            assert torch.equal(restored.encode(W).long(), codes.long()), shape


@every_exact
def test_a_codeword_encodes_to_itself(quantizer: Quantizer) -> None:
    """Whole blocks, that is: a block cut by the matrix loses the values it was nearest with."""
    for shape in SHAPES:
        fitted = quantizer.fit(gaussian(*shape))
        values = fitted.decode(fitted.encode(3 * gaussian(*shape, seed=1)))
        whole = slice(shape[1] - shape[1] % quantizer.block)
        again = fitted.decode(fitted.encode(values))
        assert torch.equal(again[:, whole], values[:, whole]), shape


@every_exact
@examples(5)
@given(st.integers(0, 10**6), st.floats(0.1, 10))
def test_encode_is_nearest_among_random_codes(
    quantizer: Quantizer, seed: int, spread: float
) -> None:
    """No other code of any block is nearer: codes of other inputs are tried in its place."""
    W, x = gaussian(6, 16, seed), spread * gaussian(6, 16, seed + 1)
    fitted = quantizer.fit(W)
    block = quantizer.block
    chosen = (fitted.decode(fitted.encode(x)) - x).square().reshape(6, -1, block).sum(-1)
    for k in range(4):
        other = fitted.decode(fitted.encode(x + gaussian(6, 16, seed + 2 + k) * spread))
        error = (other - x).square().reshape(6, -1, block).sum(-1)
        assert (chosen <= error * (1 + 1e-5) + 1e-12).all()


@every
def test_scaling_the_matrix_scales_the_result(quantizer: Quantizer) -> None:
    W = gaussian(16, 32)
    one, two = quantizer.fit(W), quantizer.fit(4 * W)
    assert torch.equal(4 * one.decode(one.encode(W)), two.decode(two.encode(4 * W)))


@every
def test_take_rows_is_the_same_quantizer(quantizer: Quantizer) -> None:
    W = gaussian(48, 19)
    fitted = quantizer.fit(W)
    codes = fitted.encode(W)
    height = fitted.row_block
    rows, packed_rows = slice(16, 32), slice(16 // height, 32 // height)
    part = fitted.take_rows(rows)
    assert part.shape == (16, 19)
    assert torch.equal(part.encode(W[rows]).long(), codes[packed_rows].long())
    assert torch.equal(part.decode(codes[packed_rows]), fitted.decode(codes)[rows])
    assert torch.equal(part.unpack(part.pack(codes[packed_rows])).long(), codes[packed_rows].long())
    with pytest.raises(ShapeError):
        fitted.take_rows(slice(16, 16))


@every
def test_column_blocks_concatenate(quantizer: Quantizer) -> None:
    W = gaussian(16, 53)
    fitted = quantizer.fit(W)
    step = 16
    parts = [fitted.encode(W[:, k : k + step], k) for k in range(0, 53, step)]
    whole = fitted.encode(W)
    assert torch.equal(torch.cat(parts, dim=1).long(), whole.long())
    values = [fitted.decode(part, k) for part, k in zip(parts, range(0, 53, step), strict=True)]
    assert torch.equal(torch.cat(values, dim=1), fitted.decode(whole))


@every
def test_position_free_means_what_it_says(quantizer: Quantizer) -> None:
    W = gaussian(32, 64)
    W[:, 16:] *= 3
    fitted = quantizer.fit(W)
    if fitted.position_free:
        here, there = fitted.encode(W[:, 16:32], 16), fitted.encode(W[:, 16:32], 0)
        assert torch.equal(here, there)
        assert torch.equal(fitted.decode(here, 16), fitted.decode(here, 0))
    else:
        assert sum(t.numel() for t in fitted.tensors().values()) > 1


@every
def test_importance_and_gain_are_accepted(quantizer: Quantizer) -> None:
    W = gaussian(16, 32)
    quantizer.fit(W, importance=torch.ones(32))
    one, two = quantizer.fit(W), quantizer.fit(W, gain=2.0)
    codes = one.encode(W)
    assert torch.equal(two.decode(codes), 2 * one.decode(codes))
    with pytest.raises(ShapeError, match="one entry per column"):
        quantizer.fit(W, importance=torch.ones(31))
    with pytest.raises(NumericalError, match="importance"):
        quantizer.fit(W, importance=-torch.ones(32))
    with pytest.raises(RecipeError, match="gain"):
        quantizer.fit(W, gain=0.0)


@every
def test_zeros_stay_zeros(quantizer: Quantizer) -> None:
    for shape in SHAPES:
        W = torch.zeros(shape)
        fitted = quantizer.fit(W)
        assert not fitted.decode(fitted.encode(W)).any()


@every
def test_outliers_stay_finite_and_near(quantizer: Quantizer) -> None:
    W = gaussian(16, 32)
    W[3, 5] = 1e4
    fitted = quantizer.fit(W)
    decoded = fitted.decode(fitted.encode(W))
    assert torch.isfinite(decoded).all()
    assert (decoded - W).square().sum() < W.square().sum()


@every
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused(quantizer: Quantizer, bad: float) -> None:
    W = gaussian(16, 16)
    fitted = quantizer.fit(W)
    W[0, 3] = bad
    with pytest.raises(NumericalError, match="1 NaN or infinite"):
        quantizer.fit(W)
    with pytest.raises(NumericalError, match="1 NaN or infinite"):
        fitted.encode(W)


@every
def test_wrong_shapes_are_refused(quantizer: Quantizer) -> None:
    fitted = quantizer.fit(gaussian(16, 32))
    for x, start in [(gaussian(15, 32), 0), (gaussian(16, 33), 0), (gaussian(16, 16), 32)]:
        with pytest.raises(ShapeError):
            fitted.encode(x, start)
    for W in (torch.zeros(0, 3), torch.zeros(4), torch.zeros(2, 0)):
        with pytest.raises(ShapeError):
            quantizer.fit(W)
    if quantizer.block > 1:
        with pytest.raises(ShapeError, match="blocks"):
            fitted.encode(gaussian(16, quantizer.block + 1), 0)


@every
def test_spoiled_tensors_are_refused(quantizer: Quantizer) -> None:
    W = gaussian(16, 32)
    fitted = quantizer.fit(W)
    packed = fitted.pack(fitted.encode(W))
    with pytest.raises(FormatError):
        fitted.unpack(packed[:-1])
    with pytest.raises(FormatError):
        fitted.unpack(packed.to(torch.int16))
    for name, tensor in fitted.tensors().items():
        rest = {k: t for k, t in fitted.tensors().items() if k != name}
        spoiled = [
            rest,
            {**rest, name: torch.cat([tensor, tensor])},
            {**rest, name: tensor.double()},
        ]
        if tensor.is_floating_point():
            spoiled.append({**rest, name: torch.full_like(tensor, torch.nan)})
        for tensors in spoiled:
            with pytest.raises(FormatError, match=name):
                quantizer.restore((16, 32), tensors)
