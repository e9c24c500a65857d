"""Exact search of a bit-shift trellis: sixteen tiles in the lanes, one state after the other.

State s_t has L bits and s_t = (s_{t-1} << K_t | b_t) mod 2^L. The future of a path depends only
on the low L - K_{t+1} bits of its state, its *edge* e, so paths with one edge compete:

    cost_t[e] = min over k < 2^K_{t+1} of  cost_{t-1}[s >> K_t] + (level(s) - x_t)^2,
                s = k << (L - K_{t+1}) | e                                  (Viterbi, 1967)

which takes 2^L branch metrics a weight whatever the rate. The lanes of a vector are sixteen
tiles: every load is contiguous, the level of s is one scalar for all of them, and no lane ever
has to be shuffled. The winning k travels in the low bits of the cost (`tagged_cost`).

Tail-biting: the best path that ends where it starts is found in two passes (Tseng et al., QTIP,
arXiv 2406.11235, algorithm 4). The first runs through a window around the cut, with free ends,
and tells the edge in which to cut; the second runs through the whole tile with that edge forced
at both ends. The window reaches `CUT_REACH` L weights to each side, more than the tile has if
need be: paths of a random code meet slowly, and a window of 5 L / K loses 2 % at L = 16, one of
8 L a third of a percent. Streams shorter than a state are searched exhaustively.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from convex_caldera.quantizers.search_threads import search_threads
from convex_caldera.quantizers.trellis_simd import (
    LANES,
    load,
    minimum,
    store,
    store_tags,
    subtract,
    tagged_cost,
)

CUT_REACH = 8  # weights on each side of the cut that pass 1 looks at, for each bit of state
SETTLE_REACH = 20  # weights after which a chained symbol is settled, for each bit of state
FORBIDDEN = np.float32(1e9)  # cost of an edge in which a tile may not start
HANDED_OVER = 1 << 24  # branch metrics that are worth another thread
RENORMALIZE = 32  # steps after which the least cost of each lane is set to 0


@numba.njit(forceinline=True)
def _advance(old, new, winners, at, levels, x, t, state_bits, bits, next_bits):  # type: ignore[no-untyped-def]
    """One step: edge costs `old` (2^(L - K_t), lanes) to `new` (2^(L - K_{t+1}), lanes)."""
    edge_bits, count = state_bits - next_bits, 1 << next_bits
    keep, low = np.int32(-count), np.int32(count - 1)
    target = load(x, LANES * t)
    for e in range(1 << edge_bits):
        cost = load(old, (e >> bits) * LANES)
        best = tagged_cost(levels[np.uint32(e)], target, cost, np.int32(0), keep)
        for k in range(1, count):
            s = (k << edge_bits) | e
            cost = load(old, (s >> bits) * LANES)
            other = tagged_cost(levels[np.uint32(s)], target, cost, np.int32(k), keep)
            best = minimum(best, other)
        store(new, e * LANES, best)
        store_tags(winners, at + e * LANES, best, low)


@numba.njit(cache=True, nogil=True)
def _renormalize(costs, size):  # type: ignore[no-untyped-def]
    """Subtract from each lane its least cost, so that float32 keeps resolving differences."""
    least = load(costs, 0)
    for e in range(1, size):
        least = minimum(least, load(costs, e * LANES))
    for e in range(size):
        store(costs, e * LANES, subtract(load(costs, e * LANES), least))


@numba.njit(cache=True, nogil=True)
def _forward(x, steps, next_bits, levels, state_bits, old, new, winners, row):  # type: ignore[no-untyped-def]
    """All steps over targets x (T, lanes); `next_bits` is K after the last one.

    Winners of step t go to winners[t * row]. The final edge costs are in `old` if T is even,
    in `new` if it is odd.
    """
    size = len(steps)
    for t in range(size):
        following = steps[t + 1] if t + 1 < size else next_bits
        at, bits = t * row, steps[t]
        # equal calls but for a literal, which lets the compiler unroll the competition
        if following == 1:
            _advance(old, new, winners, at, levels, x, t, state_bits, bits, 1)
        elif following == 2:
            _advance(old, new, winners, at, levels, x, t, state_bits, bits, 2)
        elif following == 3:
            _advance(old, new, winners, at, levels, x, t, state_bits, bits, 3)
        elif following == 4:
            _advance(old, new, winners, at, levels, x, t, state_bits, bits, 4)
        else:
            _advance(old, new, winners, at, levels, x, t, state_bits, bits, following)
        if t % RENORMALIZE == RENORMALIZE - 1:
            _renormalize(new, 1 << (state_bits - following))
        old, new = new, old


@numba.njit(cache=True, nogil=True)
def _trace(winners, row, steps, next_bits, state_bits, edges, out):  # type: ignore[no-untyped-def]
    """Walk back from the final `edges` (lanes,); the last len(out) symbols go to out (., lanes).

    Afterwards `edges` holds the edge from which out[0] left.
    """
    size = len(steps)
    skip = size - len(out)
    for lane in range(LANES):
        edge = np.int64(edges[lane])
        for t in range(size - 1, skip - 1, -1):
            following = steps[t + 1] if t + 1 < size else next_bits
            k = np.int64(winners[t * row + edge * LANES + lane])
            state = (k << (state_bits - following)) | edge
            out[t - skip, lane] = np.uint8(state & ((1 << steps[t]) - 1))
            edge = state >> steps[t]
        edges[lane] = edge


@numba.njit(cache=True, nogil=True)
def _cheapest(costs, size, edges):  # type: ignore[no-untyped-def]
    """The edge of least cost in each lane."""
    for lane in range(LANES):
        least = costs[lane]
        edges[lane] = 0
        for e in range(1, size):
            if costs[e * LANES + lane] < least:
                least = costs[e * LANES + lane]
                edges[lane] = e


@numba.njit(cache=True, nogil=True)
def _tail_biting(x, steps, reach, levels, state_bits, scratch, out):  # type: ignore[no-untyped-def]
    """Closed paths for one group of tiles, x (T, lanes) to symbols out (T, lanes)."""
    old, new, winners = scratch
    row = LANES << (state_bits - steps.min())
    size = len(steps)
    window = np.arange(-reach, reach) % size
    edges = np.zeros(LANES, np.int64)
    first = 1 << (state_bits - steps[window[0]])
    old[: first * LANES] = 0.0
    following = steps[reach % size]
    around = x[window].copy().reshape(-1)
    _forward(around, steps[window], following, levels, state_bits, old, new, winners, row)
    _cheapest(old, 1 << (state_bits - following), edges)
    half = np.empty((reach, LANES), np.uint8)
    _trace(winners, row, steps[window], following, state_bits, edges, half)

    old[: (LANES << (state_bits - steps[0]))] = FORBIDDEN
    for lane in range(LANES):
        old[edges[lane] * LANES + lane] = 0.0
    _forward(x.reshape(-1), steps, steps[0], levels, state_bits, old, new, winners, row)
    _trace(winners, row, steps, steps[0], state_bits, edges, out)


@numba.njit(cache=True, nogil=True)
def _chained(x, steps, lag, levels, state_bits, scratch, out):  # type: ignore[no-untyped-def]
    """Paths from state 0 with a free end, for one group of chains, x (T, lanes).

    Symbols are settled `lag` steps at a time once at least `lag` later ones have been seen, by
    when all paths worth keeping have long met.
    """
    old, new, winners = scratch
    fewest = steps.min()
    row = LANES << (state_bits - fewest)
    size = len(steps)
    old[: (LANES << (state_bits - steps[0]))] = FORBIDDEN
    old[:LANES] = 0.0
    edges = np.zeros(LANES, np.int64)
    settled, seen = 0, 0
    while settled < size:
        upto = min(size, settled + 2 * lag)
        following = steps[upto] if upto < size else fewest
        held = winners[(seen - settled) * row :]
        part, bits = x[seen:upto].reshape(-1), steps[seen:upto]
        _forward(part, bits, following, levels, state_bits, old, new, held, row)
        if (upto - seen) % 2:
            old, new = new, old
        seen = upto
        _cheapest(old, 1 << (state_bits - following), edges)
        symbols = np.empty((seen - settled, LANES), np.uint8)
        _trace(winners, row, steps[settled:seen], following, state_bits, edges, symbols)
        count = seen - settled if seen == size else lag
        out[settled : settled + count] = symbols[:count]
        settled += count
        winners[: (seen - settled) * row] = winners[count * row : (seen - settled + count) * row]


@numba.njit(cache=True, nogil=True)
def _exhaustive(x, steps, levels, state_bits, out):  # type: ignore[no-untyped-def]
    """The best of all 2^N closed streams of N < L bits, for tiles x (tiles, T)."""
    size, num_bits = len(steps), steps.sum()
    for i in range(len(x)):
        least = np.inf
        for stream in range(1 << num_bits):
            cyclic, length = np.int64(stream), num_bits
            while length < 2 * state_bits:  # enough turns for a window ending in the first
                cyclic, length = (cyclic << num_bits) | stream, length + num_bits
            cost, at = 0.0, 0
            for t in range(size):
                at += steps[t]
                shift = (num_bits - at) % num_bits
                state = (cyclic >> shift) & ((1 << state_bits) - 1)
                cost += (levels[state] - x[i, t]) ** 2
            if cost < least:
                least, at = cost, num_bits
                for t in range(size):
                    at -= steps[t]
                    out[i, t] = np.uint8((stream >> at) & ((1 << steps[t]) - 1))


class _Scratch(threading.local):
    """Cost and winner buffers of one thread, grown as needed, so that pages are touched once."""

    def __init__(self) -> None:
        self.costs = np.empty((2, 0), np.float32)
        self.winners = np.empty(0, np.uint8)

    def take(self, state_bits: int, fewest: int, steps: int) -> tuple[NDArray[Any], ...]:
        row = LANES << (state_bits - fewest)
        if self.costs.shape[1] < row:
            self.costs = np.empty((2, row), np.float32)
        if self.winners.size < row * steps:
            self.winners = np.empty(row * steps, np.uint8)
        return self.costs[0], self.costs[1], self.winners


_scratch = _Scratch()


@lru_cache(maxsize=1)
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Worker threads that keep their scratch; a forked process makes its own."""
    del process
    return ThreadPoolExecutor(threads, thread_name_prefix="trellis")


def run_jobs(job: Callable[[int], None], count: int, metrics: int) -> None:
    """job(0) .. job(count - 1), on as many threads as `search_threads` allows.

    `metrics` are the branch metrics of one job: handing over a small one takes longer than it.
    """
    threads = search_threads()
    if min(threads, count) < 2 or metrics < HANDED_OVER:
        for i in range(count):
            job(i)
    else:
        list(_pool(threads, os.getpid()).map(job, range(count)))


def search(
    x: NDArray[np.float32],
    steps: NDArray[np.int64],
    levels: NDArray[np.float32],
    state_bits: int,
    chained: bool,
) -> NDArray[np.uint8]:
    """Symbols b_t of the paths nearest to the sequences x (count, T), uint8 of x's shape.

    Args:
        steps: K_t, new bits of each weight, (T,).
        levels: level of every state, (2^L,).
        chained: start from state 0 and end anywhere, instead of ending where it starts.

    Cost: 2^L branch metrics a weight; 16 L weights more for a tail-biting sequence.
    Memory: T 2^(L-K) 16 bytes a thread (chained: of T = 2 lag).
    """
    count, size = x.shape
    out = np.empty((count, size), np.uint8)
    if not chained and steps.sum() < state_bits:
        _exhaustive(x, steps, levels, state_bits, out)
        return out
    reach, lag = CUT_REACH * state_bits, SETTLE_REACH * state_bits
    held = min(2 * lag, size) if chained else max(size, 2 * reach)

    def job(group: int) -> None:
        members = slice(group * LANES, min((group + 1) * LANES, count))
        lanes = np.zeros((size, LANES), np.float32)
        lanes[:, : members.stop - members.start] = x[members].T
        symbols = np.empty((size, LANES), np.uint8)
        scratch = _scratch.take(state_bits, int(steps.min()), held)
        if chained:
            _chained(lanes, steps, lag, levels, state_bits, scratch, symbols)
        else:
            _tail_biting(lanes, steps, reach, levels, state_bits, scratch, symbols)
        out[members] = symbols[:, : members.stop - members.start].T

    run_jobs(job, -(-count // LANES), LANES * size << state_bits)
    return out
