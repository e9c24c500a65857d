"""Laws of the trellis code whose levels are trained, stored with the matrix and looked up."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from convex_caldera.certify.codec import check_record
from convex_caldera.certify.decode_table import QUANTIZERS
from convex_caldera.core.recipe import Quantize, Recipe
from convex_caldera.errors import FormatError
from convex_caldera.quantizers import trellis_table, trellis_viterbi
from convex_caldera.quantizers.distortion import gaussian_distortion
from convex_caldera.quantizers.trellis import FittedTrellis, Trellis
from convex_caldera.quantizers.trellis_codes import Code, best_spread, designed_multiplier
from convex_caldera.quantizers.trellis_stream import step_bits
from convex_caldera.recipes.records import to_record
from convex_caldera.storage.codec import layer_to_tensors, recipe_layout
from tests.examples import examples
from tests.quantizers.test_trellis import brute_force, gaussian, random_codes
from tests.storage.making import make_layer

SMALL = Trellis(2.0, 6, "table")
FORMAT = QUANTIZERS["trellis"]


def with_levels(
    quantizer: Trellis, shape: tuple[int, int], levels: np.ndarray, scale: float = 1.0
) -> FittedTrellis:
    tensors = {
        "scale": torch.tensor([scale]),
        "levels": torch.from_numpy(levels.astype(np.float16)),
        "row_scale": torch.linspace(0.5, 2.0, shape[0]).half(),
    }
    return quantizer.restore(shape, tensors)


def checked(fitted: FittedTrellis, packed: torch.Tensor) -> np.ndarray:
    """Values as the checker has them."""
    record, shape = to_record(fitted.quantizer), fitted.shape
    check_record(record, FORMAT.options, "record")
    tensors = {name: t.numpy() for name, t in fitted.tensors().items()} | {"codes": packed.numpy()}
    types = {"uint8": "U8", "float32": "F32", "float16": "F16"}
    found = {name: (types[t.dtype.name], t.shape) for name, t in tensors.items()}
    assert found == FORMAT.layout(record, shape)
    return FORMAT.decode(record, shape, tensors)


def laid_out(record: dict[str, object]) -> None:
    check_record(record, FORMAT.options, "record")
    FORMAT.layout(record, (16, 16))


# --- reading and searching, whatever the levels are ---------------------------------------------


@examples(40)
@given(
    sixteenths=st.integers(16, 64),
    L=st.integers(5, 9),
    chain=st.integers(0, 2),
    row_scales=st.booleans(),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 34)),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_table_is_read_alike_by_library_checker_and_a_look_up(
    sixteenths: int, L: int, chain: int, row_scales: bool, shape: tuple[int, int], seed: int
) -> None:
    quantizer = Trellis(sixteenths / 16, L, "table", chain, row_scales=row_scales)
    patterns = np.random.default_rng(seed).integers(0, 1 << 16, 1 << L, dtype=np.uint16)
    levels = patterns.view(np.float16)  # subnormal, huge, negative zero: all that is finite
    levels = np.where(np.isfinite(levels), levels, np.float16(0))
    fitted = with_levels(quantizer, shape, levels, 0.25)
    codes = random_codes(fitted, seed)
    values = fitted.decode(codes)
    rows = np.linspace(0.5, 2.0, shape[0]).astype(np.float16) if row_scales else np.ones(1)
    units = np.float32(0.25) * rows.astype(np.float32)[:, None]
    expected = units * levels[fitted._states(codes.numpy(), shape)].astype(np.float32)
    assert np.array_equal(values.numpy(), expected)
    assert np.array_equal(checked(fitted, fitted.pack(codes)), expected)
    cut = slice(0, min(fitted.row_block, shape[0]))
    part = fitted.take_rows(cut)
    assert torch.equal(part.decode(codes[: -(-cut.stop // 16)]), values[cut])
    assert fitted.position_free == (not row_scales)


@examples(30)
@given(
    bits=st.sampled_from([1.0, 1.25, 1.5, 2.0]),
    L=st.integers(4, 7),
    width=st.integers(1, 5),
    chained=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_codes_are_the_best_of_all_streams_under_any_table(
    bits: float, L: int, width: int, chained: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    steps = step_bits(round(16 * bits), width)
    if not chained and steps.sum() >= L:
        return  # longer closed paths are found by a heuristic
    levels = rng.standard_normal(1 << L).astype(np.float16)
    fitted = with_levels(Trellis(bits, L, "table", int(chained)), (1, width), levels)
    x = rng.standard_normal((1, width)).astype(np.float32)
    values = fitted.decode(fitted.encode(torch.from_numpy(x))).numpy()
    best = brute_force(x[0], steps, levels.astype(np.float64), chained)
    assert float(((values - x) ** 2).sum()) == pytest.approx(best, abs=1e-4)


# --- training -----------------------------------------------------------------------------------


def test_training_is_a_function_of_length_and_rate() -> None:
    kept = trellis_table.trained_levels(6, 32)
    assert kept.dtype == np.float16 and kept.shape == (64,) and np.isfinite(kept).all()
    threads = torch.get_num_threads()
    torch.manual_seed(99)
    try:
        torch.set_num_threads(3 - min(threads, 2))
        again = trellis_table.trained_levels.__wrapped__(6, 32)
    finally:
        torch.set_num_threads(threads)
    assert np.array_equal(kept, again)
    assert trellis_table.trained_levels(6, 32) is kept
    fitted = SMALL.fit(gaussian(16, 16))
    fitted.levels.zero_()  # a matrix's own copy
    assert np.array_equal(trellis_table.trained_levels(6, 32), again)


def test_levels_are_centroids_of_what_they_code() -> None:
    """Lloyd's condition on samples that training has not seen; weyl's levels are far from it."""
    L, bits, spread = 8, 2, np.float32(best_spread(2.0))
    x = np.random.default_rng(3).standard_normal((256, 1024)).astype(np.float32)
    steps = step_bits(16 * bits, 1024)
    weyl = Code("weyl", L, designed_multiplier(L, bits)).table()
    gaps = []
    for levels in (weyl, trellis_table.trained_levels(L, 16 * bits).astype(np.float32)):
        symbols = trellis_viterbi.search(x, steps, spread * levels, L, chained=True)
        states = trellis_table.states_of(symbols, steps, L)[:, L:].ravel()
        count = np.bincount(states, minlength=1 << L)
        means = np.bincount(states, x[:, L:].ravel(), 1 << L) / np.maximum(count, 1)
        gaps.append(float((count * (means - spread * levels) ** 2).sum() / count.sum()))
    assert gaps[1] < 4.0**-bits / 400 and gaps[1] < gaps[0] / 2, gaps


@pytest.mark.parametrize(("bits", "L"), [(1.0, 5), (2.0, 6), (2.5, 8), (3.0, 8)])
def test_training_beats_the_levels_that_it_began_with(bits: float, L: int) -> None:
    size = (512, 128)
    trained, _ = gaussian_distortion(Trellis(bits, L, "table"), size, seed=11)
    began, _ = gaussian_distortion(Trellis(bits, L, "weyl"), size, seed=11)
    assert trained < 0.99 * began


def test_scale_and_levels_do_not_depend_on_the_matrix() -> None:
    one, two = SMALL.fit(gaussian(32, 32)), SMALL.fit(8 * gaussian(16, 48, seed=1))
    assert torch.equal(one.levels, two.levels)
    weyl = replace(SMALL, code="weyl").fit(gaussian(32, 32))
    assert torch.equal(one.scale, weyl.scale)  # levels have the unit of weyl's


# --- bytes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantizer", [SMALL, Trellis(1.5, 9, "table", 1, row_scales=True)])
def test_the_table_is_planned_and_written(quantizer: Trellis) -> None:
    shape, recipe = (40, 24), Recipe((Quantize(quantizer, "identity"),))
    planned_spec, planned = recipe_layout(recipe, shape)
    spec, tensors = layer_to_tensors(make_layer(gaussian(*shape), recipe))
    assert spec == planned_spec
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == planned
    plain = replace(quantizer, code="mul1")
    _, without = layer_to_tensors(
        make_layer(gaussian(*shape), Recipe((Quantize(plain, "identity"),)))
    )
    more = tensors["packed"].numel() - without["packed"].numel()
    assert more == 2 << quantizer.state_bits


@pytest.mark.parametrize(
    "spoiled",
    [
        torch.zeros(63).half(),
        torch.zeros(65).half(),
        torch.zeros(2, 32).half(),
        torch.zeros(64),
        torch.full((64,), torch.nan).half(),
        torch.tensor([0.0] * 63 + [torch.inf]).half(),
        None,
    ],
    ids=["short", "long", "shape", "type", "nan", "infinite", "missing"],
)
def test_spoiled_table_is_refused(spoiled: torch.Tensor | None) -> None:
    fitted = SMALL.fit(gaussian(16, 16))
    tensors = {name: t for name, t in fitted.tensors().items() if name != "levels"}
    if spoiled is not None:
        tensors["levels"] = spoiled
    with pytest.raises(FormatError, match="levels"):
        SMALL.restore((16, 16), tensors)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_checker_refuses_levels_that_are_no_numbers(bad: float) -> None:
    fitted = SMALL.fit(gaussian(16, 16))
    tensors = {name: t.numpy().copy() for name, t in fitted.tensors().items()}
    tensors["codes"] = fitted.pack(fitted.encode(gaussian(16, 16))).numpy()
    tensors["levels"][7] = bad
    with pytest.raises(FormatError, match="levels"):
        FORMAT.decode(to_record(SMALL), (16, 16), tensors)


@pytest.mark.parametrize("change", [{"state_bits": 13}, {"encoder": "beam"}, {"code": "tables"}])
def test_checker_refuses_records_that_no_table_has(change: dict[str, object]) -> None:
    with pytest.raises(FormatError):
        laid_out({**to_record(SMALL), **change})
