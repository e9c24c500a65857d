"""Laws of the entropy coders: lossless, near the entropy, and nothing but their own streams."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from convex_caldera import coding
from convex_caldera.coding import huffman, rans, symbols
from convex_caldera.coding.bitpack import pack_bits
from convex_caldera.coding.huffman import Huffman
from convex_caldera.coding.rans import Rans
from convex_caldera.core.protocols import Coder
from convex_caldera.errors import FormatError, RecipeError
from convex_caldera.quantizers import E8P, KMeans, LloydMax, NormalFloat, Trellis, Uniform
from tests.examples import examples

KINDS = sorted(coding.TABLE)
PLAIN = {"huffman": huffman.decode_plain, "rans": rans.decode_plain}
every_kind = pytest.mark.parametrize("kind", KINDS)
quick = examples(40)


def coder(kind: str, width: int) -> Coder:
    return coding.TABLE[kind](width)


@st.composite
def streams(draw: st.DrawFn) -> tuple[int, Tensor]:
    """A symbol width and a packed stream of very uneven symbols."""
    width = draw(st.integers(1, 8))
    pool = draw(st.lists(st.integers(0, 2**width - 1), min_size=1, max_size=6))
    chosen = draw(st.lists(st.sampled_from(pool), max_size=80))
    return width, pack_bits(torch.tensor(chosen, dtype=torch.uint8), width)


def gaussian_codes(count: int, width: int, seed: int = 0) -> Tensor:
    x = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    middle = 2 ** (width - 1)
    return pack_bits((x * middle / 3 + middle).round().clamp(0, 2 * middle - 1).byte(), width)


@every_kind
@quick
@given(streams())
def test_coder_is_lossless_and_equals_the_plain_decoder(
    kind: str, case: tuple[int, Tensor]
) -> None:
    width, packed = case
    stream = coder(kind, width).encode(packed)
    assert torch.equal(coder(kind, width).decode(stream, packed.numel()), packed)
    count = symbols.num_symbols(packed.numel(), width)
    if count:
        plain = PLAIN[kind](stream.numpy(), count, width)
        assert np.array_equal(plain, symbols.to_symbols(packed, width))


@every_kind
@quick
@given(streams(), st.binary(min_size=1, max_size=5))
def test_coder_refuses_garbage_after_its_end(
    kind: str, case: tuple[int, Tensor], tail: bytes
) -> None:
    width, packed = case
    stream = coder(kind, width).encode(packed)
    longer = torch.cat([stream, torch.frombuffer(bytearray(tail), dtype=torch.uint8)])
    with pytest.raises(FormatError):
        coder(kind, width).decode(longer, packed.numel())


@every_kind
@quick
@given(streams(), st.data())
def test_coder_refuses_truncated_streams(
    kind: str, case: tuple[int, Tensor], data: st.DataObject
) -> None:
    width, packed = case
    stream = coder(kind, width).encode(packed)
    if stream.numel():
        end = data.draw(st.integers(0, stream.numel() - 1))
        with pytest.raises(FormatError):
            coder(kind, width).decode(stream[:end], packed.numel())


@every_kind
@quick
@given(st.integers(1, 8), st.binary(max_size=60), st.integers(0, 40))
def test_coder_never_crashes_on_forged_streams(
    kind: str, width: int, forged: bytes, num_bytes: int
) -> None:
    """Whatever the bytes, there is a FormatError or a stream of the size that was asked for."""
    stream = torch.frombuffer(bytearray(forged), dtype=torch.uint8) if forged else torch.empty(0)
    try:
        packed = coder(kind, width).decode(stream.to(torch.uint8), num_bytes)
    except FormatError:
        return
    assert packed.dtype == torch.uint8 and packed.numel() == num_bytes


@every_kind
def test_a_flipped_bit_is_noticed_or_changes_symbols(kind: str) -> None:
    packed = gaussian_codes(600, 3)
    stream = coder(kind, 3).encode(packed)
    for position in range(0, 8 * stream.numel(), 7):
        spoiled = stream.clone()
        spoiled[position // 8] ^= 1 << position % 8
        try:
            assert not torch.equal(coder(kind, 3).decode(spoiled, packed.numel()), packed)
        except FormatError:
            continue


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_rans_is_within_half_a_percent_of_the_entropy(width: int) -> None:
    packed = gaussian_codes(1 << 19, width)
    stream = Rans(width).encode(packed)
    count = symbols.num_symbols(packed.numel(), width)
    header = 2 + 2 * 2**width + 4 * symbols.num_parts(count)
    assert stream.numel() <= 1.005 * symbols.entropy(packed, width) / 8 + header


@pytest.mark.parametrize("width", [2, 4, 8])
def test_huffman_is_within_a_bit_of_the_entropy_and_no_worse_than_fixed(width: int) -> None:
    packed = gaussian_codes(1 << 17, width)
    count = symbols.num_symbols(packed.numel(), width)
    header = 2 + 2**width + 5 * symbols.num_parts(count)
    length = 8 * (Huffman(width).encode(packed).numel() - header)
    assert symbols.entropy(packed, width) <= length + 8 * header
    assert length <= min(symbols.entropy(packed, width) + count, width * count)


@every_kind
def test_parts_are_read_side_by_side(kind: str) -> None:
    packed = gaussian_codes(5 * symbols.PART_SYMBOLS + 3, 4)
    count = symbols.num_symbols(packed.numel(), 4)
    assert symbols.num_parts(count) == 4
    stream = coder(kind, 4).encode(packed)
    assert torch.equal(coder(kind, 4).decode(stream, packed.numel()), packed)


def test_three_symbols_by_hand() -> None:
    """Symbols 0 0 2 of two bits: code lengths 1 and 1, so 0, 0, 1 in one byte 0b100."""
    packed = pack_bits(torch.tensor([0, 0, 2, 0], dtype=torch.uint8), 2)
    stream = Huffman(2).encode(packed)
    assert stream.tolist() == [0, 2, 0x01, 0x01, 1, 0, 0, 0, 0b0100]


def test_package_merge_is_best_under_the_limit() -> None:
    """Fibonacci weights want lengths above twelve; Kraft's sum stays one, the rest unchanged."""
    counts = [1, 1]
    while len(counts) < 20:
        counts.append(counts[-1] + counts[-2])
    lengths = huffman.code_lengths(np.array(counts))
    assert lengths.max() == huffman.MAX_LENGTH and (0.5**lengths).sum() == 1.0
    assert huffman.code_lengths(np.array([5, 0, 5, 5, 5])).tolist() == [2, 0, 2, 2, 2]
    assert huffman.code_lengths(np.array([8, 4, 2, 1, 1])).tolist() == [1, 2, 3, 4, 4]


def test_frequencies_sum_to_their_total_and_keep_rare_symbols() -> None:
    counts = np.array([10**9, 1, 0, 3, 10**6])
    frequencies = rans.normalized(counts)
    assert frequencies.sum() == rans.TOTAL
    assert (frequencies > 0).tolist() == (counts > 0).tolist()


@pytest.mark.parametrize(
    ("quantizer", "width"),
    [
        (Uniform(3), 3),
        (LloydMax(8), 8),
        (NormalFloat(4), 4),
        (E8P(2), 8),
        (E8P(3), 8),
        (KMeans(1, 8), 8),
        (KMeans(2.5, 4), 5),
        (KMeans(3, 4), 6),
        (Trellis(2.0), 8),
    ],
    ids=str,
)
def test_symbols_divide_the_codes_of_every_quantizer(quantizer: object, width: int) -> None:
    assert symbols.symbol_bits(quantizer) == width  # type: ignore[arg-type]


def test_entropy_of_known_streams() -> None:
    assert symbols.entropy(torch.zeros(9, dtype=torch.uint8), 3) == 0.0
    half = torch.tensor([0b01010101] * 8, dtype=torch.uint8)
    assert symbols.entropy(half, 1) == pytest.approx(64.0)
    assert symbols.entropy(half, 2) == 0.0


@every_kind
def test_symbols_of_impossible_widths_are_refused(kind: str) -> None:
    for width in (0, 9):
        with pytest.raises(RecipeError, match="1 to 8 bits"):
            coder(kind, width)


def test_rans_is_no_longer_than_constriction() -> None:
    """An independent implementation of the same idea, where it is installed."""
    constriction = pytest.importorskip("constriction")
    packed = gaussian_codes(1 << 16, 4)
    values = symbols.to_symbols(packed, 4)
    share = np.bincount(values, minlength=16) / values.size
    family = constriction.stream.model.Categorical(share, perfect=False)
    encoder = constriction.stream.stack.AnsCoder()
    encoder.encode_reverse(values.astype(np.int32), family)
    other = 4 * len(encoder.get_compressed())
    assert Rans(4).encode(packed).numel() <= 1.004 * other + 2 + 32 + 16
