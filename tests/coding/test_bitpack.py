"""Laws of fixed-width packing: lossless, exactly as long as promised, and one stream by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from convex_caldera.coding.bitpack import MAX_BITS, pack_bits, packed_bytes, unpack_bits
from convex_caldera.errors import FormatError, RecipeError


@st.composite
def coded(draw: st.DrawFn) -> tuple[int, list[int]]:
    bits = draw(st.integers(1, MAX_BITS))
    return bits, draw(st.lists(st.integers(0, 2**bits - 1), max_size=50))


@given(coded())
def test_pack_bits_is_lossless_and_tight(case: tuple[int, list[int]]) -> None:
    bits, codes = case
    packed = pack_bits(torch.tensor(codes, dtype=torch.int64), bits)
    assert packed.shape == (packed_bytes(len(codes), bits),) == ((len(codes) * bits + 7) // 8,)
    assert unpack_bits(packed, bits, len(codes)).tolist() == codes


@given(coded())
def test_pack_bits_is_one_little_endian_number(case: tuple[int, list[int]]) -> None:
    bits, codes = case
    stream = int.from_bytes(bytes(pack_bits(torch.tensor(codes).long(), bits).tolist()), "little")
    assert stream == sum(code << (i * bits) for i, code in enumerate(codes))


def test_pack_bits_by_hand() -> None:
    # 101 | 011 | 110, least significant bit first: bits 1 0 1 1 1 0 0 1 | 1
    packed = pack_bits(torch.tensor([0b101, 0b011, 0b110]), 3)
    assert packed.tolist() == [0b10011101, 0b1]


def test_pack_bits_crosses_chunks() -> None:
    codes = torch.arange((1 << 20) + 5) % 8
    unpacked = unpack_bits(pack_bits(codes, 3), 3, codes.numel())
    assert torch.equal(unpacked.long(), codes)


def test_pack_bits_flattens_row_major_and_takes_any_integer_type() -> None:
    codes = torch.tensor([[1, 2], [3, 0]], dtype=torch.uint8)
    assert torch.equal(pack_bits(codes, 2), pack_bits(codes.flatten().int(), 2))


@pytest.mark.parametrize("codes", [[4], [-1], [0, 1, 2, 5]])
def test_pack_bits_refuses_codes_out_of_range(codes: list[int]) -> None:
    with pytest.raises(FormatError, match=r"0 \.\. 3"):
        pack_bits(torch.tensor(codes), 2)


def test_pack_bits_refuses_floats() -> None:
    with pytest.raises(FormatError, match="integers"):
        pack_bits(torch.ones(3), 2)


@pytest.mark.parametrize("bits", [0, -1, MAX_BITS + 1])
def test_bits_out_of_range_are_refused(bits: int) -> None:
    with pytest.raises(RecipeError, match="1 to 16 bits"):
        pack_bits(torch.zeros(1, dtype=torch.int64), bits)
    with pytest.raises(RecipeError, match="1 to 16 bits"):
        unpack_bits(torch.zeros(1, dtype=torch.uint8), bits, 1)


def test_unpack_bits_refuses_spoiled_streams() -> None:
    packed = pack_bits(torch.tensor([1, 2, 3]), 3)
    with pytest.raises(FormatError, match="take 2 bytes, got 3"):
        unpack_bits(torch.cat([packed, packed[:1]]), 3, 3)
    with pytest.raises(FormatError, match="take 2 bytes, got 1"):
        unpack_bits(packed[:1], 3, 3)
    with pytest.raises(FormatError, match="7 padding bits"):
        unpack_bits(packed | torch.tensor([0, 128], dtype=torch.uint8), 3, 3)
    with pytest.raises(FormatError, match="flat uint8"):
        unpack_bits(packed.int(), 3, 3)
    with pytest.raises(FormatError, match="flat uint8"):
        unpack_bits(packed[None], 3, 3)
