"""Neural codes: geometry, exact start, training, packing, and two decoders that agree."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from convex_caldera.certify import decode_neural
from convex_caldera.certify.codec import check_record
from convex_caldera.certify.decode_table import QUANTIZERS
from convex_caldera.errors import FormatError, NumericalError, RecipeError, ShapeError
from convex_caldera.quantizers import DoubleScale, Neural
from convex_caldera.quantizers.neural import TrainedNeural
from convex_caldera.quantizers.neural_decoder import (
    Decoder,
    DecoderShape,
    evaluate,
    quantize_parameters,
    width_for,
)
from convex_caldera.quantizers.neural_embedding import embedding_codes, embedding_values
from convex_caldera.quantizers.neural_encoder import make_encoder
from convex_caldera.quantizers.neural_patches import joined, patches_of, unpatched
from convex_caldera.quantizers.neural_start import cosine_basis, linear_decoder
from convex_caldera.quantizers.neural_training import Training, train
from convex_caldera.recipes.records import from_record, to_record
from convex_caldera.storage.shard import NAMES
from tests.examples import examples

SMALL = Neural(8, 4, (2,), (2,), 10, (1, 1), epochs=2, encoder_width=4, embed_bits=4)


def gaussian(m: int, n: int, seed: int = 0) -> torch.Tensor:
    """Within [-1, 1], as after division by scales."""
    values = torch.randn(m, n, generator=torch.Generator().manual_seed(seed)) / 3
    return values.clamp(-1, 1)


def random_decoder(shape: DecoderShape, bits: int, seed: int = 0) -> Decoder:
    random = torch.Generator().manual_seed(seed)
    parameters = [
        (
            torch.randn(x.outputs, x.inputs, x.kernel, x.kernel, generator=random) / x.inputs**0.5,
            torch.randn(x.outputs, generator=random),
        )
        for x in shape.layers
    ]
    return quantize_parameters(shape, parameters, bits)


GEOMETRIES = [
    DecoderShape(8, 4, (2,), (2,), 10, (1, 1), 2),
    DecoderShape(16, 3, (4, 2), (2, 2), 9, (1, 5), 12),  # the stem shuffles by 2
    DecoderShape(12, 2, (3, 2), (2, 3), 7, (3, 3), 4),
    DecoderShape(4, 16, (4,), (4,), 32, (1, 3), 4),
]


@pytest.mark.parametrize("shape", GEOMETRIES, ids=str)
def test_layers_unfold_an_embedding_into_a_patch(shape: DecoderShape) -> None:
    decoder = random_decoder(shape, 4)
    e = torch.zeros(3, shape.channels, shape.grid, shape.grid)
    assert decoder.decode(e).shape == (3, shape.patch, shape.patch)
    assert shape.weights == sum(w.numel() for w, _ in decoder.parameters(torch.float32))
    stored = {name: (t.dtype, tuple(t.shape)) for name, t in decoder.tensors().items()}
    assert stored == shape.layout(4)
    again = Decoder.restore(shape, 4, decoder.tensors())
    e = torch.rand(3, shape.channels, shape.grid, shape.grid)
    assert torch.equal(again.decode(e), decoder.decode(e))


@examples(15)
@given(st.integers(1, 16), st.sampled_from([(2,), (4,), (2, 2), (4, 2)]), st.integers(0, 99))
def test_training_starts_from_the_linear_code(
    channels: int, strides: tuple[int, ...], seed: int
) -> None:
    """GELU(u) - GELU(-u) = u: the start computes the transform exactly, at any depth."""
    side = int(np.prod(strides))
    shape = DecoderShape(2 * side, channels, strides, strides, 64, (1, 3), 4)
    random = torch.Generator().manual_seed(seed)
    basis = cosine_basis(channels, side)
    parameters = linear_decoder(shape, basis, random)
    e = torch.randn(2, channels, 2, 2, generator=random)
    expected = torch.nn.functional.conv_transpose2d(
        e, basis.view(channels, 1, side, side), stride=side
    )
    assert (evaluate(shape, parameters, e) - expected).abs().max() < 1e-4
    if channels <= side**2:
        assert torch.allclose(basis @ basis.T, torch.eye(channels), atol=1e-5)


def test_a_start_without_room_is_random() -> None:
    shape = DecoderShape(8, 16, (4,), (4,), 8, (1, 1), 2)
    parameters = linear_decoder(shape, cosine_basis(16, 4), torch.Generator().manual_seed(0))
    assert all(weight.abs().min() < weight.abs().max() for weight, _ in parameters)
    assert (parameters[1][0] != 0).all()


@pytest.mark.parametrize("shape", [(8, 8), (5, 19), (17, 3), (16, 24), (1, 1)])
def test_patches_cover_a_matrix_and_count_it_once(shape: tuple[int, int]) -> None:
    V = gaussian(*shape)
    importance = torch.arange(1.0, shape[1] + 1)
    patches = patches_of(V, 8, importance)
    assert torch.equal(unpatched(patches.values[:, 0], shape), V)
    expected = float((V.square() * importance).sum())
    assert float(patches.energy.sum()) == pytest.approx(expected, rel=1e-5)
    # whatever stands in the padding costs nothing
    assert float(patches.errors(patches.values).sum()) == 0
    filled = patches.values + (patches.columns * patches.rows == 0)
    assert float(patches.errors(filled).sum()) == 0


def test_joined_matrices_weigh_alike() -> None:
    parts = [patches_of(scale * gaussian(8, 8, seed), 8) for seed, scale in ((0, 1.0), (1, 0.01))]
    energy = joined(parts).energy
    assert energy[0] == pytest.approx(float(energy[1]), rel=1e-4)


@given(st.integers(1, 8))
def test_embeddings_are_cells_of_equal_width(bits: int) -> None:
    codes = torch.arange(1 << bits).double()
    values = embedding_values(codes, bits)
    assert torch.equal(embedding_codes(values, bits), codes)
    assert values.abs().max() < 1 and torch.allclose(values, -values.flip(0))
    edges = torch.tensor([-1.0, 1.0])
    assert embedding_codes(edges, bits).tolist() == [0, (1 << bits) - 1]


@pytest.mark.slow
def test_training_lowers_the_error_and_repeats_itself() -> None:
    V = torch.sin(torch.arange(16.0) / 3).outer(torch.cos(torch.arange(16.0) / 2))
    patches = patches_of(V, 8)
    shape = DecoderShape(8, 2, (4,), (4,), 12, (1, 3), 4)
    options = Training(6, 6, 4, 25, 1e-2, 1)
    seen: list[tuple[int, int, float]] = []
    decoder, encoder = train(patches, shape, options, lambda *step: seen.append(step))
    again, _ = train(patches, shape, options)
    for name, tensor in decoder.tensors().items():
        assert torch.equal(tensor, again.tensors()[name]), name
    assert [step[0] for step in seen] == list(range(1, 26)) and seen[0][1] == 25
    assert min(s[2] for s in seen[-5:]) < 0.5 * seen[0][2]
    assert encoder(patches.values).shape == (4, 2, 2, 2)
    other, _ = train(patches, shape, dataclasses.replace(options, seed=2, epochs=1))
    assert not torch.equal(other.codes, decoder.codes)


def test_threads_do_not_show() -> None:
    V = gaussian(24, 24)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            fitted = SMALL.fit(V)
            found.append((fitted.decoder.codes, fitted.encode(V)))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("shape", [(16, 16), (9, 21), (1, 1)])
def test_codes_pack_and_restore(shape: tuple[int, int]) -> None:
    V = gaussian(*shape)
    fitted = SMALL.fit(V)
    codes = fitted.encode(V)
    stored = {**fitted.tensors(), "codes": fitted.pack(codes)}
    assert {k: (t.dtype, tuple(t.shape)) for k, t in stored.items()} == SMALL.layout(shape)
    again = SMALL.restore(shape, fitted.tensors())
    assert torch.equal(again.decode(again.unpack(stored["codes"])), fitted.decode(codes))
    assert from_record(to_record(SMALL)) == SMALL


@pytest.mark.slow
def test_full_embeddings_code_almost_like_scalars() -> None:
    """4 values for 2 x 2 pixels at 4 bits: a uniform code under an orthogonal transform."""
    V = gaussian(48, 48)
    fitted = dataclasses.replace(SMALL, epochs=8).fit(V)
    error = (fitted.decode(fitted.encode(V)) - V).square().mean() / V.square().mean()
    assert error < 0.03
    assert SMALL.bits == 4


@pytest.mark.slow
def test_important_columns_are_served_better() -> None:
    V, heavy = gaussian(16, 32), torch.ones(32)
    heavy[::4] = 100
    quantizer = dataclasses.replace(SMALL, channels=1, epochs=1, refinements=60)
    errors = []
    for importance in (None, heavy):
        fitted = quantizer.fit(V, importance=importance)
        errors.append((fitted.decode(fitted.encode(V)) - V)[:, ::4].square().sum())
    assert errors[1] < 0.8 * errors[0]


def test_scales_go_around_it() -> None:
    """Inside double_scale any matrix will do, and scaling it scales the result."""
    W = 37.0 * gaussian(24, 40)
    quantizer = DoubleScale(SMALL, 16)
    one, two = quantizer.fit(W), quantizer.fit(4 * W)
    codes = one.encode(W)
    assert torch.equal(4 * one.decode(codes), two.decode(two.encode(4 * W)))
    again = quantizer.restore((24, 40), one.tensors())
    assert torch.equal(again.decode(codes), one.decode(codes))


def test_a_shared_decoder_is_stored_at_home_only() -> None:
    V = gaussian(16, 16)
    home = SMALL.fit(V)
    guest = dataclasses.replace(SMALL, home="a.layer")
    quantizer = DoubleScale(TrainedNeural(guest, home.decoder, home.encoder), 8)
    fitted = quantizer.fit(V)
    assert fitted.quantizer == DoubleScale(guest, 8)
    assert set(fitted.tensors()) == {"scale_codes", "steps", "offset"}
    borrowed = {f"inner_{name}": t for name, t in home.decoder.tensors().items()}
    assert set(fitted.quantizer.borrows) == set(borrowed)
    codes = fitted.encode(V)
    again = fitted.quantizer.restore((16, 16), {**fitted.tensors(), **borrowed})
    assert torch.equal(again.decode(codes), fitted.decode(codes))
    with pytest.raises(FormatError, match="inner_decoder"):
        fitted.quantizer.restore((16, 16), fitted.tensors())
    with pytest.raises(RecipeError, match=r"a\.layer must be trained first"):
        guest.fit(V)


def test_width_is_the_largest_that_fits() -> None:
    shape = DecoderShape(32, 16, (4, 2), (4, 2), 1, (1, 3), 12)
    for budget in (8000, 20_000, 1_000_000):
        wide = dataclasses.replace(shape, width=width_for(budget, shape))
        wider = dataclasses.replace(wide, width=wide.width + 1)
        assert wide.weights + wide.outputs <= budget < wider.weights + wider.outputs
    with pytest.raises(RecipeError, match="raise modelsize"):
        width_for(100, shape)


# --- the checker's decoder ------------------------------------------------------------------


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("shape", [(8, 8), (13, 30)])
def test_checker_agrees_to_the_last_place(geometry: DecoderShape, shape: tuple[int, int]) -> None:
    fields = dataclasses.asdict(geometry)
    quantizer = Neural(**fields, decoder_bits=5, embed_bits=3, epochs=1)
    decoder = random_decoder(geometry, 5)
    fitted = quantizer.restore(shape, decoder.tensors())
    count = quantizer.patches(shape) * geometry.embedding
    random = torch.Generator().manual_seed(7)
    codes = torch.randint(8, (count,), generator=random).to(torch.uint8)
    packed = fitted.pack(codes)
    expected = fitted.decode(fitted.unpack(packed)).numpy()
    record = to_record(quantizer)
    known = QUANTIZERS["neural"]
    check_record(record, known.options, "record")
    tensors = {**decoder.tensors(), "codes": packed}
    layout = {name: (NAMES[t.dtype], tuple(t.shape)) for name, t in tensors.items()}
    assert known.layout(record, shape) == layout
    found = known.decode(record, shape, {name: t.numpy() for name, t in tensors.items()})
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() <= decode_neural.TOLERANCE * np.abs(expected).max()
    assert (found != expected).mean() < 1e-3


def checked_layout(record: dict) -> None:
    known = QUANTIZERS["neural"]
    check_record(record, known.options, "record")
    known.layout(record, (8, 8))


def test_checker_refuses_what_does_not_fit() -> None:
    record = to_record(SMALL)
    known = QUANTIZERS["neural"]
    for key, value in {
        "patch": 9, "dec_strides": [4], "kernels": [3, 1], "width": 0, "embed_bits": 9,
        "home": 3, "patch ": 1,
    }.items():  # fmt: skip
        with pytest.raises(FormatError):
            checked_layout({**record, key: value})
    huge = {**record, "patch": 8192, "width": 4096}
    with pytest.raises(FormatError, match="features"):
        known.layout(huge, (8, 8))
    fitted = SMALL.fit(gaussian(8, 8))
    tensors = {k: t.numpy() for k, t in fitted.tensors().items()}
    tensors["codes"] = fitted.pack(fitted.encode(gaussian(8, 8))).numpy()
    for name in ("decoder_scales", "decoder_biases"):
        with pytest.raises(FormatError, match="NaN"):
            known.decode(record, (8, 8), {**tensors, name: np.full_like(tensors[name], np.nan)})
    with pytest.raises(FormatError, match="negative"):
        known.decode(record, (8, 8), {**tensors, "decoder_scales": -1 - tensors["decoder_scales"]})
    with pytest.raises(FormatError, match="missing"):
        known.decode({**record, "home": "x"}, (8, 8), {"codes": tensors["codes"]})


# --- bad input ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch": 9}, "no multiple"),
        ({"dec_strides": (4,)}, "does not divide"),
        ({"enc_strides": ()}, "strides are positive"),
        ({"kernels": (2, 4)}, "odd"),
        ({"channels": 0}, "positive"),
        ({"decoder_bits": 9}, "2 to 8 bits"),
        ({"embed_bits": 0}, "1 to 8"),
        ({"epochs": 0}, "positive"),
        ({"rate": 0.0}, "positive"),
        ({"patch": 8192, "width": 4096}, "features"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        dataclasses.replace(SMALL, **options)


def test_bad_matrices_are_refused() -> None:
    V = gaussian(8, 8)
    with pytest.raises(NumericalError, match="put them in double_scale"):
        SMALL.fit(100 * V)
    with pytest.raises(NumericalError, match="1 NaN"):
        SMALL.fit(torch.where(V == V[0, 0], torch.nan, V))
    with pytest.raises(RecipeError, match="no scale"):
        SMALL.fit(V, gain=2.0)
    fitted = SMALL.fit(V)
    for call in (
        lambda: fitted.encode(V[:, :4]),
        lambda: fitted.decode(fitted.encode(V), 4),
        lambda: fitted.take_rows(slice(0, 4)),
    ):
        with pytest.raises(ShapeError, match="at once"):
            call()
    with pytest.raises(NumericalError, match="lower the learning rate"):
        dataclasses.replace(SMALL, rate=1e30, epochs=3).fit(V)
    assert fitted.take_rows(slice(0, 8)) is fitted
    scales = {**fitted.tensors(), "decoder_scales": -1 - fitted.tensors()["decoder_scales"]}
    with pytest.raises(FormatError, match="not negative"):
        SMALL.restore((8, 8), scales)


def test_the_encoder_forgets_no_length() -> None:
    """The linear path: twice the patch, a larger embedding, whatever the layer norms do."""
    shape = GEOMETRIES[0]
    encoder = make_encoder(shape, 4, cosine_basis(4, 2), torch.Generator().manual_seed(0))
    x = 0.1 * patches_of(gaussian(8, 8), 8).values
    assert (encoder(2 * x).abs() > encoder(x).abs()).all()
