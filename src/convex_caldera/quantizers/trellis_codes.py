"""Reproduction levels of a trellis: a number for every state, computed or from a trained table.

A code maps an L-bit state s to a level whose distribution over all states is nearly Gaussian.
All arithmetic is on uint32, modulo 2^32:

    mul1    x = 0x83DCD12D s;  the sum of the four bytes of x, minus 510
    mul2    x = 0x83DCD12D s;  x = 0x9E3779B1 (x xor (x >> 15));  byte sum as above
    1mad    x = 34038481 s + 76625530;  byte sum as above
    3inst   x = 89226354 s + 64248484;  x = (x & 0x8FFF8FFF) xor 0x3B603B60;  the sum of the
            upper and the lower half of x read as IEEE half precision
    mcg     as 3inst with x = 0xCBAC1FED s

Byte sums are Irwin-Hall(4): one multiplication, integer levels, and on CPUs one dot-product
instruction adds the bytes of sixteen states. `mul2` mixes the oldest bits of states longer
than 24 bits, which one multiplication leaves in the top byte alone. A level's unit is the
code's own; `SIGMA` is its standard deviation over all states, and stored scales absorb it.

Sources: 1mad and 3inst, Tseng et al., QTIP, arXiv 2406.11235; mcg and mul1, the constants of
ExLlamaV3; mul2 is ours.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

COMPUTED_CODES = ("mul1", "mul2", "1mad", "3inst", "mcg")

# Standard deviation of the levels over 2^32 states: four bytes give sqrt(4 (256^2 - 1) / 12).
_BYTE_SUM_SIGMA = 147.8005
_HALVES_SIGMA = 1.24371
SIGMA = {
    "mul1": _BYTE_SUM_SIGMA,
    "mul2": _BYTE_SUM_SIGMA,
    "1mad": _BYTE_SUM_SIGMA,
    "3inst": _HALVES_SIGMA,
    "mcg": _HALVES_SIGMA,
}

# (multiplier, addend, xor-shift, second multiplier) of the byte-sum codes; shift 0 is no mixing
BYTE_SUM_CODES = {
    "mul1": (0x83DCD12D, 0, 0, 1),
    "mul2": (0x83DCD12D, 0, 15, 0x9E3779B1),
    "1mad": (34038481, 76625530, 0, 1),
}

TABLE_STATE_BITS = 16  # longest state whose levels are tabulated for speed


def mix(code: str, states: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """The hashed word x of every state, uint32."""
    s = states.astype(np.uint32)
    if code == "mul1":
        return s * np.uint32(0x83DCD12D)
    if code == "mul2":
        x = s * np.uint32(0x83DCD12D)
        return (x ^ (x >> np.uint32(15))) * np.uint32(0x9E3779B1)
    if code == "1mad":
        return s * np.uint32(34038481) + np.uint32(76625530)
    x = (
        s * np.uint32(0xCBAC1FED)
        if code == "mcg"
        else s * np.uint32(89226354) + np.uint32(64248484)
    )
    return (x & np.uint32(0x8FFF8FFF)) ^ np.uint32(0x3B603B60)


def computed_levels(code: str, states: NDArray[np.uint32]) -> NDArray[np.float32]:
    """Levels of `states` under a computed code, exact in float32."""
    x = np.ascontiguousarray(mix(code, states))
    if code in ("3inst", "mcg"):
        halves = x.view(np.float16).reshape(*x.shape, 2).astype(np.float32)
        return halves[..., 0] + halves[..., 1]
    total = x.view(np.uint8).reshape(*x.shape, 4).sum(axis=-1, dtype=np.int32)
    return (total - 510).astype(np.float32)


@lru_cache(maxsize=32)
def level_table(code: str, state_bits: int) -> NDArray[np.float32]:
    """Levels of all 2^state_bits states, read-only, for state_bits <= TABLE_STATE_BITS."""
    table = computed_levels(code, np.arange(1 << state_bits, dtype=np.uint32))
    table.flags.writeable = False
    return table


def levels_of(code: str, state_bits: int, states: NDArray[np.uint32]) -> NDArray[np.float32]:
    """Levels of given states; looked up where the table is small enough to be worth making."""
    if state_bits <= TABLE_STATE_BITS:
        return level_table(code, state_bits)[states]
    return computed_levels(code, states)
