"""The trellis kernel multiplies by what the quantizer decodes, whatever stream it is given."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from convex_caldera.quantizers.trellis import FittedTrellis, Trellis
from convex_caldera.quantizers.trellis_stream import Tiling
from convex_caldera.runtime.kernels import REFERENCE, kernel_for, trellis_cpu, trellis_wide
from tests.examples import examples

# Encoders do not matter to a decoder: streams are random bits, of every format a file may have.
QUANTIZERS = {
    "weyl": Trellis(2.0, 14),
    "weyl, longest rate": Trellis(7.9375, 12),
    "weyl, long states": Trellis(6.0, 20, "weyl", 4, "beam"),
    "weyl, wide windows": Trellis(4.0, 28, "weyl", 2, "beam", row_scales=True),
    "mul1": Trellis(1.0, 16, "mul1"),
    "mul1, chained": Trellis(1.0, 28, "mul1", 1, "beam"),
    "mul2": Trellis(3.4375, 26, "mul2", 3, "beam"),
    "1mad": Trellis(8.0, 16, "1mad"),
    "3inst": Trellis(2.5, 14, "3inst"),
    "3inst, chained": Trellis(1.0625, 16, "3inst", 2),
    "mcg": Trellis(3.0625, 16, "mcg", row_scales=True),
    "table": Trellis(2.0, 8, "table"),
    "table, chained": Trellis(5.5, 10, "table", 2),
}


def random_coded(
    quantizer: Trellis, shape: tuple[int, int], seed: int
) -> tuple[FittedTrellis, Tensor, Tensor]:
    """A fitted trellis, random packed codes, and the matrix that they decode to."""
    generator = torch.Generator().manual_seed(seed)
    fitted = quantizer.fit(torch.randn(shape, generator=generator))
    tiling = Tiling(shape, quantizer.sixteenths)
    mask, spare = (torch.from_numpy(a) for a in (tiling.byte_mask(), tiling.spare_bits()))
    codes = torch.randint(0, 256, mask.shape, generator=generator).to(torch.uint8)
    codes = torch.where(mask, codes & ~spare, torch.zeros((), dtype=torch.uint8))
    return fitted, fitted.pack(codes), fitted.decode(codes)


@pytest.mark.parametrize("name", QUANTIZERS)
@examples(12)
@given(
    m=st.integers(1, 70), n=st.integers(1, 50), tokens=st.integers(1, 4), seed=st.integers(0, 99)
)
def test_product_equals_reference(name: str, m: int, n: int, tokens: int, seed: int) -> None:
    fitted, packed, W = random_coded(QUANTIZERS[name], (m, n), seed)
    x = torch.randn(tokens, n, generator=torch.Generator().manual_seed(seed + 1))
    kernel = kernel_for(fitted, "cpu")
    assert kernel.name == "trellis_cpu"
    scale = (x.abs() @ W.abs().T).max().item()  # what float32 rounding is relative to
    out = kernel.forward(fitted, packed, x)
    expected = REFERENCE.forward(fitted, packed, x)
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-6 * scale)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_slices_equal_decoding_bit_for_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trellis_cpu, "SLICE_VALUES", 1)  # a tile row at a time: random access
    for shape in ((53, 39), (16, 16), (1, 1), (40, 1)):
        fitted, packed, W = random_coded(QUANTIZERS[name], shape, seed=0)
        pieces = [values.clone() for _, values in trellis_cpu.decoded_slices(fitted, packed)]
        assert torch.equal(torch.cat(pieces), W)


def test_inputs_beyond_the_width_are_not_read() -> None:
    """A narrow last tile has lanes without a column; whatever they decode to counts nothing."""
    fitted, packed, W = random_coded(Trellis(2.0, 14), (20, 19), seed=3)
    x = torch.zeros(1, 19)
    x[0, 18] = 1.0
    torch.testing.assert_close(trellis_cpu.multiply(fitted, packed, x)[0], W[:, 18])


# --- the way of wide registers ------------------------------------------------------------------

wide = pytest.mark.skipif(not trellis_wide.available(), reason="needs AVX-512 VBMI and VNNI")
# a loop is compiled for each family of codes, for one token or more, for rows of whole bytes or not
WIDE = [
    (Trellis(2.0, 14), 1),
    (Trellis(2.0, 14), 3),
    (Trellis(7.9375, 12), 1),
    (Trellis(1.0, 16, "mul1"), 1),
    (Trellis(8.0, 20, "mul2", 2, "beam", row_scales=True), 1),
    (Trellis(2.5, 14, "3inst", 3), 1),
    (Trellis(2.0, 8, "table"), 1),
]


@wide
@pytest.mark.parametrize(("quantizer", "tokens"), WIDE, ids=str)
def test_wide_product_equals_the_narrow_one(
    quantizer: Trellis, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted, packed, _ = random_coded(quantizer, (96, 64), seed=7)
    x = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(8))
    found = trellis_cpu.multiply(fitted, packed, x)
    monkeypatch.setattr(trellis_wide, "available", lambda: False)
    assert torch.equal(found, trellis_cpu.multiply(fitted, packed, x))


@wide
def test_threads_share_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    fitted, packed, _ = random_coded(Trellis(2.0, 14, "mul1", 2), (112, 32), seed=9)
    x = torch.randn(1, 32, generator=torch.Generator().manual_seed(8))
    alone = trellis_cpu.multiply(fitted, packed, x)
    monkeypatch.setattr(trellis_wide, "THREAD_WEIGHTS", 512)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(trellis_cpu.multiply(fitted, packed, x), alone)


@pytest.mark.parametrize("sixteenths", [16, 20, 25, 32, 55, 128])
def test_places_and_shifts_cut_out_the_windows(sixteenths: int) -> None:
    """Windows of a random stream by the tables, beside those of the written format."""
    L, rng = 25, np.random.default_rng(sixteenths)
    tile = rng.integers(0, 256, 2 * sixteenths, dtype=np.uint8)
    stream = np.concatenate([tile[-4:], tile, np.zeros(64, np.uint8)])
    bits = "".join(f"{byte:08b}" for byte in stream)
    places, shifts = (t.reshape(16, 16, -1) for t in trellis_wide.row_tables(sixteenths, L))
    for row in range(16):
        begin = max(row * sixteenths // 8, 0) if row * sixteenths >= 32 else 0
        for c in range(16):
            taken = int.from_bytes(stream[begin:][places[row, c]].tobytes(), "little")
            end = 32 + (16 * row + c + 1) * sixteenths // 16
            assert taken >> int(shifts[row, c, 0]) & (1 << L) - 1 == int(bits[end - L : end], 2)
