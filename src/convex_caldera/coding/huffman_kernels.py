"""Writing and reading Huffman bits, compiled. `huffman.decode_plain` is the oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)
def encode(symbols: Any, codes: Any, lengths: Any, part: int) -> Any:
    """(bytes of each part, all parts) of uint8 symbols in parts of `part`."""
    reverse = np.zeros(codes.size, np.uint64)
    for s in range(codes.size):
        for k in range(lengths[s]):
            if codes[s] >> k & 1:
                reverse[s] |= np.uint64(1) << np.uint64(lengths[s] - 1 - k)
    count = symbols.size
    total = 0
    sizes = np.zeros(-(-count // part), np.int64)
    for p in range(sizes.size):
        bits = 0
        for i in range(p * part, min((p + 1) * part, count)):
            bits += lengths[symbols[i]]
        sizes[p] = (bits + 7) // 8
        total += sizes[p]
    out = np.zeros(total, np.uint8)
    at = 0
    for p in range(sizes.size):
        held, waiting = np.uint64(0), 0
        for i in range(p * part, min((p + 1) * part, count)):
            s = symbols[i]
            held |= reverse[s] << np.uint64(waiting)
            waiting += lengths[s]
            while waiting >= 8:
                out[at] = held & np.uint64(255)
                held >>= np.uint64(8)
                waiting -= 8
                at += 1
        if waiting:
            out[at] = held & np.uint64(255)
            at += 1
    return sizes, out


@njit(cache=True, nogil=True)
def decode(count: int, part: int, table: Any, longest: int, sizes: Any, body: Any) -> Any:
    """(symbols (count,), whether every part ends with its last symbol and zeros)."""
    out = np.empty(count, np.uint8)
    mask = np.uint64((1 << longest) - 1)
    begin = 0
    for p in range(sizes.size):
        end = begin + sizes[p]
        at, held, waiting, taken = begin, np.uint64(0), 0, 0
        for i in range(p * part, min((p + 1) * part, count)):
            while waiting < longest:
                if at < end:
                    held |= np.uint64(body[at]) << np.uint64(waiting)
                at += 1
                waiting += 8
            entry = table[held & mask]
            out[i] = entry >> 4
            length = np.int64(entry & 15)
            held >>= np.uint64(length)
            waiting -= length
            taken += length
        if (taken + 7) // 8 != sizes[p]:
            return out, False
        if taken & 7 and body[end - 1] >> (taken & 7):
            return out, False
        begin = end
    return out, True
