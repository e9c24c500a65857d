"""Bits of a trellis stream to and from bytes; `trellis_stream` is the format."""

from __future__ import annotations

import numba
import numpy as np


@numba.njit(cache=True, nogil=True)
def write_symbols(symbols, steps, out):  # type: ignore[no-untyped-def]
    """Write symbols (tiles, T), K_t = steps[t] bits each, into out (tiles, bytes), zeroed."""
    for i in range(symbols.shape[0]):
        buffer, held, at = np.uint64(0), 0, 0
        for t in range(symbols.shape[1]):
            buffer = (buffer << np.uint64(steps[t])) | np.uint64(symbols[i, t])
            held += steps[t]
            while held >= 8:
                held -= 8
                out[i, at] = np.uint8((buffer >> np.uint64(held)) & np.uint64(0xFF))
                at += 1
        if held:
            out[i, at] = np.uint8((buffer << np.uint64(8 - held)) & np.uint64(0xFF))


@numba.njit(cache=True, nogil=True)
def _read_bits(codes, at, count):  # type: ignore[no-untyped-def]
    """`count` <= 32 bits of a byte row from bit `at` on, most significant first."""
    value = np.uint64(0)
    for i in range(at, at + count):
        bit = (codes[i >> 3] >> np.uint8(7 - (i & 7))) & np.uint8(1)
        value = (value << np.uint64(1)) | np.uint64(bit)
    return value


@numba.njit(cache=True, nogil=True)
def read_states(codes, height, width, sixteenths, state_bits, chain, states):  # type: ignore[no-untyped-def]
    """States (rows, width) of one column block of `height` rows; codes (tile rows, bytes)."""
    mask = (np.uint64(1) << np.uint64(state_bits)) - np.uint64(1)
    state = np.uint64(0)
    for i in range(codes.shape[0]):
        rows = min(16, height - 16 * i)
        size = rows * width
        num_bits = size * sixteenths // 16
        if chain == 0:
            state = np.uint64(0)
            for j in range(state_bits):
                position = (num_bits - state_bits + j) % num_bits
                state = (state << np.uint64(1)) | _read_bits(codes[i], position, 1)
        elif i % chain == 0:
            state = np.uint64(0)
        buffer, held, byte, at, t = np.uint64(0), 0, 0, 0, 0
        for row in range(16 * i, 16 * i + rows):
            for column in range(width):
                t += 1
                count = (t * sixteenths >> 4) - at
                while held < count:
                    buffer = (buffer << np.uint64(8)) | np.uint64(codes[i, byte])
                    held, byte = held + 8, byte + 1
                held, at = held - count, at + count
                fresh = buffer >> np.uint64(held)
                fresh &= (np.uint64(1) << np.uint64(count)) - np.uint64(1)
                state = ((state << np.uint64(count)) | fresh) & mask
                states[row, column] = np.uint32(state)
