"""Fixed-width codes of a little-endian bit stream: code i is the bits i b .. (i + 1) b - 1.

Bit k of the stream is bit k mod 8 of byte k // 8; bits after the last code are zero.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from convex_caldera.certify.codec import Array
from convex_caldera.errors import FormatError

_CHUNK = 1 << 20  # codes unpacked at a time, a multiple of eight


def packed_size(count: int, bits: int) -> int:
    """Bytes of `count` codes."""
    return -(-count * bits // 8)


def unpack(packed: Array, bits: int, count: int) -> NDArray[Any]:
    """(count,) codes of 1 to 16 bits, uint8 up to 8 bits, else uint16.

    Raises FormatError if spare bits are set.
    """
    spare = 8 * len(packed) - count * bits
    if not 0 <= spare < 8 or (spare and int(packed[-1]) >> (8 - spare)):
        raise FormatError(f"{count} codes of {bits} bits: wrong length, or spare bits not zero")
    dtype = np.uint8 if bits <= 8 else np.uint16
    codes = np.empty(count, dtype)
    weights = (1 << np.arange(bits)).astype(dtype)
    for start in range(0, count, _CHUNK):
        stop = min(start + _CHUNK, count)
        raw = packed[start * bits // 8 : packed_size(stop, bits)]
        stream = np.unpackbits(raw, bitorder="little", count=(stop - start) * bits)
        codes[start:stop] = (stream.reshape(-1, bits) * weights).sum(axis=1, dtype=dtype)
    return codes
