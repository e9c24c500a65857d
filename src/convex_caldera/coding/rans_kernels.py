"""The two loops of rANS, compiled. `rans.decode_plain` is the oracle. Kernels release the GIL."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)
def encode(symbols: Any, frequencies: Any, precision: int, lanes: int) -> Any:
    """(states (lanes,), words) of uint8 symbols, in the decoder's order."""
    starts = np.zeros(frequencies.size, np.uint64)
    for s in range(1, frequencies.size):
        starts[s] = starts[s - 1] + np.uint64(frequencies[s - 1])
    wide = frequencies.astype(np.uint64)
    states = np.full(lanes, 1 << 16, np.uint64)
    words = np.empty(symbols.size + 1, np.uint16)  # a symbol pushes one word at most
    at = words.size
    bits, limit = np.uint64(precision), np.uint64(32 - precision)
    for i in range(symbols.size - 1, -1, -1):
        s, lane = symbols[i], i % lanes
        x, f = states[lane], wide[s]
        if x >= f << limit:
            at -= 1
            words[at] = x & np.uint64(0xFFFF)
            x >>= np.uint64(16)
        quotient = x // f
        states[lane] = (quotient << bits) + (x - quotient * f) + starts[s]
    return states.astype(np.uint32), words[at:].copy()


@njit(cache=True, nogil=True)
def decode(count: int, frequencies: Any, precision: int, states: Any, words: Any) -> Any:
    """(symbols (count,), words used, final states); `used` exceeds the words if they end early."""
    total = 1 << precision
    owner = np.empty(total, np.uint8)
    # per slot: frequency, and slot - start of its symbol, in one word
    step = np.empty(total, np.uint32)
    slot = 0
    for s in range(frequencies.size):
        for k in range(frequencies[s]):
            owner[slot] = s
            step[slot] = np.uint32(frequencies[s]) << np.uint32(16) | np.uint32(k)
            slot += 1
    lanes = states.copy()
    out = np.empty(count, np.uint8)
    mask, bits = np.uint32(total - 1), np.uint32(precision)
    low, half = np.uint32(1 << 16), np.uint32(16)
    at, size, width = 0, words.size, states.size
    for begin in range(0, count, width):
        for lane in range(min(width, count - begin)):
            x = lanes[lane]
            slot = x & mask
            out[begin + lane] = owner[slot]
            entry = step[slot]
            x = (entry >> half) * (x >> bits) + (entry & np.uint32(0xFFFF))
            if x < low:
                x = x << half | (np.uint32(words[at]) if at < size else np.uint32(0))
                at += 1
            lanes[lane] = x
    return out, at, lanes
