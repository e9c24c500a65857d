"""What entropy coders see: the fixed-width code stream of a matrix, cut into small symbols.

A coder knows nothing of quantizers. The packed codes (`FittedQuantizer.pack`) are a bit stream;
symbol i is its bits i w .. (i + 1) w - 1, least significant first, for a width w of 1 to 8 that
fits the codes: that of a scalar code itself, or a part of a longer one. Bits after the last
whole symbol are zero, as in every packed stream.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from convex_caldera.coding.bitpack import pack_bits, unpack_bits
from convex_caldera.core.protocols import Quantizer
from convex_caldera.errors import FormatError, RecipeError

Bytes = NDArray[np.uint8]
MAX_SYMBOL_BITS = 8
# Symbols of one independent part of a stream; parts are decoded side by side.
PART_SYMBOLS = 1 << 14
MAX_PARTS = 1 << 10


def check_symbol_bits(symbol_bits: int) -> None:
    """RecipeError unless symbols have 1 to 8 bits."""
    if not 1 <= symbol_bits <= MAX_SYMBOL_BITS:
        raise RecipeError(f"symbols have 1 to {MAX_SYMBOL_BITS} bits, got {symbol_bits}")


def symbol_bits(quantizer: Quantizer) -> int:
    """The width that fits a quantizer's codes: the largest divisor of a code's bits up to 8.

    Found from the layout of eight rows of one block, so it holds for every kind; of nested ones
    it is that of the innermost, which makes the codes, and what that says itself if it does.
    """
    while (inner := getattr(quantizer, "inner", None)) is not None:
        quantizer = inner
    if (own := getattr(quantizer, "symbol_bits", None)) is not None:
        return int(own)
    dtype, (num_bytes,) = quantizer.layout((8, quantizer.block))["codes"]
    width = num_bytes * dtype.itemsize  # 8 bits a byte, eight rows
    divisors = [w for w in range(1, MAX_SYMBOL_BITS + 1) if width % w == 0]
    return divisors[-1] if divisors[-1] > 1 or width == 1 else MAX_SYMBOL_BITS


def num_symbols(num_bytes: int, width: int) -> int:
    """Whole symbols in so many bytes."""
    return 8 * num_bytes // width


def num_parts(count: int) -> int:
    """Independent parts of a stream of `count` symbols, a power of two up to 1024."""
    return 1 << min(max(count // PART_SYMBOLS, 1).bit_length() - 1, MAX_PARTS.bit_length() - 1)


def to_symbols(packed: Tensor, width: int) -> Bytes:
    """The symbols of a packed stream. Raises FormatError if bits after the last are set."""
    count = num_symbols(packed.numel(), width)
    used = (count * width + 7) // 8
    if used != packed.numel():
        raise FormatError(f"{packed.numel()} bytes are no stream of {width}-bit symbols")
    return unpack_bits(packed.cpu(), width, count).numpy()


def stream_of(packed: Tensor, width: int, encode: Callable[[Bytes], Bytes]) -> Tensor:
    """A packed stream as the stream that a coder makes of its symbols; none for no symbols."""
    symbols = to_symbols(packed, width)
    return torch.from_numpy(encode(symbols) if symbols.size else symbols)


def packed_of(
    coder: str, stream: Tensor, num_bytes: int, width: int, decode: Callable[[Bytes, int], Bytes]
) -> Tensor:
    """The packed stream of `num_bytes` that `stream_of` was given; `decode` is told the count."""
    count = num_symbols(num_bytes, width)
    plain = stream.cpu().contiguous().numpy()
    if not count:
        require(coder, not plain.size, "has bytes for no symbols")
        return torch.zeros(num_bytes, dtype=torch.uint8)
    return from_symbols(decode(plain, count), width)


def symbol_range(coder: str, stream: Bytes, width: int) -> tuple[int, int]:
    """Lowest and highest symbol, which every coded stream begins with."""
    require(coder, stream.size >= 2, "is truncated")
    low, high = int(stream[0]), int(stream[1])
    require(coder, low <= high < 1 << width, f"has symbols {low} .. {high} out of range")
    return low, high


def require(coder: str, condition: bool, what: str) -> None:
    """FormatError naming the coder unless the condition holds of a stream."""
    if not condition:
        raise FormatError(f"a {coder} stream {what}: altered or truncated file")


def from_symbols(symbols: Bytes, width: int) -> Tensor:
    """Inverse of `to_symbols`."""
    return pack_bits(torch.from_numpy(symbols), width)


def entropy(packed: Tensor, width: int) -> float:
    """Empirical order-0 entropy of all symbols of a stream together, in bits."""
    counts = np.bincount(to_symbols(packed, width))
    present = counts[counts > 0].astype(np.float64)
    total = float(present.sum())
    if not total:
        return 0.0
    return math.fsum(-present * np.log2(present / total))
