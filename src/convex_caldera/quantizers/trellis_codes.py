"""Reproduction levels of a trellis: a number for every state.

A code maps an L-bit state s to a level; over all states the levels are nearly Gaussian. All
arithmetic is on uint32, modulo 2^32:

    weyl    x = M s;  the Gaussian quantile of the upper ten bits of x: entry x >> 22 of
            round(4096 Phi^-1((i + 1/2) / 1024)) / 4096, i = 0 .. 1023;  M is stored with the
            matrix, so that better ones need no new reader; ours are in `MULTIPLIERS`
    mul1    x = 0x83DCD12D s;  the sum of the four bytes of x, minus 510
    mul2    x = 0x83DCD12D s;  x = 0x9E3779B1 (x xor (x >> 15));  byte sum as above
    1mad    x = 34038481 s + 76625530;  byte sum as above
    3inst   x = 89226354 s + 64248484;  x = (x & 0x8FFF8FFF) xor 0x3B603B60;  the sum of the
            upper and the lower half of x read as IEEE half precision
    mcg     as 3inst with x = 0xCBAC1FED s
    table   entry s of 2^L float16 numbers that are stored with the matrix, L <= 12; ours are
            trained by `trellis_table`

`weyl` is not a hash: x / 2^32 is the fractional part of a sum of multiples of one number, one
for each bit of the window (a Weyl sequence), chosen so that the 2^K levels that can follow a
path, and the 2^K levels of paths that meet, are spread evenly over the quantiles instead of at
random. That is worth as much as four more state bits: at L = 12 it beats a random table of 2^16
levels at 4 bits, with one multiplication and a table of 2 KB.

Byte sums are Irwin-Hall(4): one multiplication, integer levels, and on CPUs one dot-product
instruction adds the bytes of sixteen states. `mul2` mixes the oldest bits of states longer
than 24 bits, which one multiplication leaves in the top byte alone. A level's unit is the
code's own; `SIGMA` is its standard deviation over all states, and stored scales absorb it.

Sources: 1mad and 3inst, Tseng et al., QTIP, arXiv 2406.11235; mcg and mul1, the constants of
ExLlamaV3; weyl and mul2 are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, lru_cache
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import NDArray

CodeName = Literal["weyl", "mul1", "mul2", "1mad", "3inst", "mcg", "table"]

# (multiplier, addend, xor-shift, second multiplier) of the byte-sum codes; shift 0 is no mixing
BYTE_SUM_CODES = {
    "mul1": (0x83DCD12D, 0, 0, 1),
    "mul2": (0x83DCD12D, 0, 15, 0x9E3779B1),
    "1mad": (34038481, 76625530, 0, 1),
}

# M of `weyl` by (state bits, floor(bits)), found by benchmarks/trellis_design.py
MULTIPLIERS = {
    (8, 1): 0x84DAB045,
    (8, 2): 0xC26C9F9D,
    (8, 3): 0xE25F64AB,
    (8, 4): 0xBB48689B,
    (10, 1): 0x89351897,
    (10, 2): 0xBCB6E913,
    (10, 3): 0xDDC41107,
    (10, 4): 0xC56B59A9,
    (10, 5): 0xB87C2667,
    (10, 6): 0xB44008AF,
    (10, 7): 0xF8F6EB3B,
    (10, 8): 0xF5FC11E1,
    (12, 1): 0x95B42E2D,
    (12, 2): 0xC3674F67,
    (12, 3): 0xE0634FAF,
    (12, 4): 0xF0A13AE9,
    (12, 5): 0xC583B18D,
    (12, 6): 0xE5D2E007,
    (12, 7): 0x907BA44B,
    (12, 8): 0xDE20DBDD,
    (14, 1): 0x8E131ED5,
    (14, 2): 0xB5D34AFD,
    (14, 3): 0xDFD6415D,
    (14, 4): 0x90059815,
    (14, 5): 0xF518D72D,
    (14, 6): 0xCD95B2EB,
    (14, 7): 0xC9F09BBD,
    (14, 8): 0xD889F795,
    (16, 1): 0x8F18C3AD,
    (16, 2): 0xB40D35D7,
    (16, 3): 0xC748DEDF,
    (16, 4): 0xB44CFB03,
    (16, 5): 0xDF3655DD,
    (16, 6): 0xF50FC73D,
    (16, 7): 0x91C10FF1,
    (16, 8): 0xB8881415,
    (20, 1): 0x86993341,
    (20, 2): 0xB80EC72F,
    (20, 3): 0xE1328E49,
    (20, 4): 0xAFE2E1CB,
    (20, 5): 0x97DE76FB,
    (20, 6): 0xD4017887,
    (20, 7): 0xBAFFF685,
    (20, 8): 0xEE17B8ED,
    (24, 1): 0x92F8ED33,
    (24, 2): 0xC557AF33,
    (24, 3): 0x8E8B3917,
    (24, 4): 0xBB4D14E1,
    (24, 5): 0xBAE797D9,
    (24, 6): 0xEB2422DF,
    (24, 7): 0x9CF8C32F,
    (24, 8): 0x9D4A611F,
    (28, 1): 0x94FB6147,
    (28, 2): 0xBEAE01DD,
    (28, 3): 0xA1FAC13D,
    (28, 4): 0xA5B6AB87,
    (28, 5): 0xD6D8F89B,
    (28, 6): 0x84998AC9,
    (28, 7): 0xDD8EC379,
}

# The same for rates from halfway to the next whole one on: most steps are of the longer kind.
UPPER_MULTIPLIERS = {
    (10, 1): 0xC19E4199,
    (10, 2): 0xA08D5A39,
    (12, 1): 0xC2D92087,
    (12, 2): 0xA09885C3,
    (12, 3): 0xAFDD4EFF,
    (12, 4): 0xEF788953,
    (12, 5): 0x8D5A5E13,
    (12, 6): 0xF4299867,
    (12, 7): 0x9701FE59,
}

# Standard deviation of the levels over 2^32 states: four bytes give sqrt(4 (256^2 - 1) / 12).
BYTE_SUM_SIGMA = 147.8005
BYTE_SUM_MEAN = 510
HALVES_SIGMA = 1.24371

# Least-error standard deviation of the levels for an N(0, 1) source, by bits; the same within
# one percent for L = 12, 14 and 16. An ideal code would have sqrt(1 - 4^-bits); at high rates
# wider levels pay, which reach the tails (Panter and Dite's density tends to variance 3).
SPREAD_BITS = (1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0)
SPREADS = (0.892, 0.980, 1.012, 1.043, 1.053, 1.081, 1.097, 1.150, 1.230, 1.374)

QUANTILE_BITS = 10
MAX_DESIGNED_BITS = 28
TABLE_STATE_BITS = 16  # longest state whose levels are tabulated for speed
MAX_STORED_BITS = 12  # longest state whose levels may be stored: 8 KB, half a first-level cache


def designed_multiplier(state_bits: int, bits: float) -> int:
    """M of `weyl` for this state length and rate; any odd M decodes, a designed one spreads.

    Lengths that were not searched take the next longer one's, rates above the last its.
    """
    length = min((L for L, _ in MULTIPLIERS if L >= state_bits), default=MAX_DESIGNED_BITS)
    most = max(K for L, K in MULTIPLIERS if length == L)
    place = length, min(math.floor(bits), most)
    upper = UPPER_MULTIPLIERS.get(place) if bits % 1 >= 0.5 else None
    return MULTIPLIERS[place] if upper is None else upper


def best_spread(bits: float) -> float:
    """Standard deviation of the levels that suits a source of standard deviation 1."""
    return float(np.interp(bits, SPREAD_BITS, SPREADS))


@dataclass(frozen=True)
class Code:
    """One code at one state length.

    `multiplier` is M of `weyl` and 0 for all others; `stored` the levels of `table`, 2^L
    little-endian float16 numbers, and empty for all others.
    """

    name: str
    state_bits: int
    multiplier: int = 0
    stored: bytes = b""

    @property
    def sigma(self) -> float:
        """Standard deviation of the levels, nearly; of `table` the unit that its levels are in."""
        if self.name in ("weyl", "table"):
            return 1.0
        return BYTE_SUM_SIGMA if self.name in BYTE_SUM_CODES else HALVES_SIGMA

    def levels(self, states: NDArray[np.uint32]) -> NDArray[np.float32]:
        """Levels of states, looked up where the table is small enough to be worth making."""
        if self.state_bits <= TABLE_STATE_BITS:
            return _table(self)[states]
        return computed_levels(self, states)

    def table(self) -> NDArray[np.float32]:
        """Levels of all 2^L states, read-only, for L <= TABLE_STATE_BITS."""
        return _table(self)


@cache
def quantiles() -> NDArray[np.float32]:
    """Levels of `weyl` by the upper ten bits of x, multiples of 2^-12, read-only."""
    count = 1 << QUANTILE_BITS
    inverse = NormalDist().inv_cdf
    exact = [inverse((i + 0.5) / count) for i in range(count)]
    table = (np.rint(4096 * np.array(exact)) / 4096).astype(np.float32)
    table.flags.writeable = False
    return table


@lru_cache(maxsize=32)
def _table(code: Code) -> NDArray[np.float32]:
    table = computed_levels(code, np.arange(1 << code.state_bits, dtype=np.uint32))
    table.flags.writeable = False
    return table


def computed_levels(code: Code, states: NDArray[np.uint32]) -> NDArray[np.float32]:
    """Levels of states, by the formulas above and exact in float32."""
    if code.name == "table":
        return np.frombuffer(code.stored, "<f2").astype(np.float32)[states]
    s = states.astype(np.uint32)
    if code.name == "weyl":
        x = s * np.uint32(code.multiplier)
        return quantiles()[x >> np.uint32(32 - QUANTILE_BITS)]
    if code.name in BYTE_SUM_CODES:
        multiplier, addend, shift, second = (np.uint32(v) for v in BYTE_SUM_CODES[code.name])
        x = s * multiplier + addend
        if shift:
            x = (x ^ (x >> shift)) * second
        total = np.ascontiguousarray(x).view(np.uint8).reshape(*x.shape, 4)
        return (total.sum(axis=-1, dtype=np.int32) - BYTE_SUM_MEAN).astype(np.float32)
    if code.name == "mcg":
        x = s * np.uint32(0xCBAC1FED)
    else:
        x = s * np.uint32(89226354) + np.uint32(64248484)
    x = (x & np.uint32(0x8FFF8FFF)) ^ np.uint32(0x3B603B60)
    halves = np.ascontiguousarray(x).view(np.float16).reshape(*x.shape, 2).astype(np.float32)
    return halves[..., 0] + halves[..., 1]
