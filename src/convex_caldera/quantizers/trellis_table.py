"""A trellis's levels learned from what they code: Lloyd's iteration along best paths.

The code `table` stores its 2^L levels with the matrix instead of computing them. Each is brought
to the centroid of the Gaussian weights whose best path visits its state,

    T[s] <- T[s] + a_r n_s / (n_s + p) (mean of x_t over all t with s_t = s  -  T[s]),

s the best path of N(0, 1) samples under T and n_s how often it visits s: the two conditions of an
optimal scalar code (Lloyd, 1982) with the search of a trellis in place of the nearest level. Plain
steps (a = 1, p = 0) converge slowly, so the first ones go twice as far; later ones shrink, since
every round draws fresh samples whose noise should average out, and p keeps a level with few visits
near where it began, which is weyl's.

Samples are the quantiles of the Gaussian in random order: tails then never differ.

Sources: Stewart, Gray and Linde, 1982 (trellis codes designed by Lloyd's iteration); Tseng et al.,
QTIP, arXiv 2406.11235 (codes looked up). Differs: begins with a designed code, not a random one.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from convex_caldera.core.seeds import generator
from convex_caldera.quantizers import trellis_viterbi
from convex_caldera.quantizers.trellis_codes import Code, best_spread, designed_multiplier
from convex_caldera.quantizers.trellis_stream import RATE_UNIT, step_bits

ROUNDS = 16
SAMPLES = 256  # a level and round, as long as they are
MOST = 1 << 17  # samples in a round
FEWEST = 1 << 14
LENGTH = 512  # of a chain; a multiple of 16, after which a rate's pattern of steps repeats
FIRST_STEP = 2.0
BOLD_ROUNDS = 3  # of the first step; then steps shrink as one over the round
PRIOR = 64.0  # visits after which a level goes half-way


@lru_cache(maxsize=64)
def trained_levels(state_bits: int, sixteenths: int) -> NDArray[np.float16]:
    """Levels (2^L,) of all states for sixteenths / 16 bits, float16 and read-only.

    Their unit is that of weyl's: times `best_spread` they suit a source of standard deviation 1.
    A function of its arguments alone; kept for the life of the process.

    Cost: `ROUNDS` searches of at most `MOST` weights: 2.4 s of a core at L = 12, 0.1 s at L = 8.
    """
    bits = sixteenths / RATE_UNIT
    spread = np.float32(best_spread(bits))
    start = Code("weyl", state_bits, designed_multiplier(state_bits, bits))
    levels, size = spread * start.table(), 1 << state_bits
    steps = step_bits(sixteenths, LENGTH)
    samples = _quantiles(min(max(FEWEST, SAMPLES * size), MOST))
    draws = generator(0, f"{state_bits} {sixteenths}", "trellis table")
    for done in range(ROUNDS):
        x = samples[torch.randperm(len(samples), generator=draws)].view(-1, LENGTH).numpy()
        symbols = trellis_viterbi.search(x, steps, levels, state_bits, chained=True)
        # in its first L bits a chain has not the choice that later weights have
        states = states_of(symbols, steps, state_bits)[:, state_bits:].ravel()
        errors = x[:, state_bits:].ravel() - levels[states]
        visits = np.bincount(states, minlength=size)
        step = FIRST_STEP * min(1.0, BOLD_ROUNDS / (done + 1))
        moves = step * np.bincount(states, errors, size) / (visits + PRIOR)
        levels = (levels + moves).astype(np.float32)
    found = (levels / spread).astype(np.float16)
    found.flags.writeable = False
    return found


def _quantiles(count: int) -> torch.Tensor:
    """Quantiles (count,) of N(0, 1) at evenly spaced probabilities, float32."""
    middles = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return torch.special.ndtri(middles).float()


def states_of(
    symbols: NDArray[np.uint8], steps: NDArray[np.int64], state_bits: int, laps: int = 1
) -> NDArray[np.int64]:
    """States (streams, T) that symbols of K_t = steps[t] bits walk through from state 0.

    With two laps those of streams that close on themselves.
    """
    state = np.zeros(len(symbols), np.int64)
    states = np.empty(symbols.shape, np.int64)
    for _ in range(laps):
        for t, bits in enumerate(steps):
            state = (state << bits | symbols[:, t]) & ((1 << state_bits) - 1)
            states[:, t] = state
    return states
