"""Beam search of a bit-shift trellis with long memory: keep the M best paths, whatever L is.

With L = 24 to 28 the trellis has too many states to visit, but nearly all are far from the
data. From M survivors a step makes M 2^K candidates and keeps about the M cheapest (the
M-algorithm of Anderson and Mohan, 1984). Survivors, not states, are what distortion costs.

Selection. The M-th smallest candidate cost is estimated from an evenly spread sample of the
candidates, and one pass appends whatever costs less; the number kept wanders by a few percent
around M and nothing is sorted, counted twice or moved. Candidates are costed and appended
sixteen at a time.

A beam cannot close a short tile on itself (closing needs look-ahead that it does not have);
tiles are chained down the rows instead. No symbol is settled before the end of the chain:
survivors keep different histories for hundreds of weights (two families of paths seldom meet in
a state; one dies out), and settling early would cut off the better. The tree of histories stays
small because branches without survivors are collected every `COLLECT` steps.

Levels are computed from the state (`trellis_codes`): byte sums, or quantiles from 4 KB.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from convex_caldera.quantizers import trellis_codes
from convex_caldera.quantizers.trellis_codes import Code
from convex_caldera.quantizers.trellis_simd import (
    LANES,
    add_word,
    append_below,
    byte_sum_cost,
    count_up,
    exclusive_or,
    load,
    load_words,
    mask_word,
    multiply_word,
    shift_left,
    shift_right,
    store,
    table_cost,
)
from convex_caldera.quantizers.trellis_viterbi import run_jobs

COLLECT = 64  # steps between two collections of nodes that nothing descends from
SAMPLE = 2048  # candidates from which the limit is estimated
ROOM = 1.5  # arrays hold this many times M survivors
BINS = 512
RENORMALIZE = 32
MERGE = 4  # steps between two searches for paths that have met


@numba.njit(forceinline=True)
def _cost(product, cost, target, unit, shift, second, table):  # type: ignore[no-untyped-def]
    """Costs of sixteen candidates whose states' first products are given."""
    if len(table):
        return table_cost(product, shift, table, target, cost)
    if shift > 0:
        product = multiply_word(exclusive_or(product, shift_right(product, shift)), second)
    return byte_sum_cost(product, unit, target, cost)


@numba.njit(cache=True, nogil=True)
def _sample_costs(states, costs, count, bits, mask, code, target, unit, sample):  # type: ignore[no-untyped-def]
    """Fill `sample` with the costs of evenly spread candidates; returns how many there are."""
    multiplier, addend, shift, second, table = code
    groups = (count + LANES - 1) // LANES
    stride = max(1, (groups * LANES << bits) // len(sample) + 1)
    taken = 0
    for group in range(stride // 2, groups, stride):
        first = mask_word(shift_left(load_words(states, group * LANES), np.uint32(bits)), mask)
        product = add_word(multiply_word(first, multiplier), addend)
        cost = load(costs, group * LANES)
        for b in range(1 << bits):
            branch = add_word(product, np.uint32(b) * multiplier)
            store(sample, taken, _cost(branch, cost, target, unit, shift, second, table))
            taken += min(LANES, count - group * LANES)
        if taken + (LANES << bits) > len(sample):
            break
    return taken


@numba.njit(cache=True, nogil=True)
def _quantile(sample, taken, share, bins):  # type: ignore[no-untyped-def]
    """A value below which about `share` of sample[:taken] lie, and the least of them.

    Candidate costs crowd near the least, so bins are even in the root of the excess over it.
    """
    least, most = sample[0], sample[0]
    for i in range(1, taken):
        least, most = min(least, sample[i]), max(most, sample[i])
    bins[:] = 0
    per_root = np.float32(len(bins) - 1) / np.sqrt(max(most - least, np.float32(1e-30)))
    for i in range(taken):
        bins[np.int64(np.sqrt(sample[i] - least) * per_root)] += 1
    need, below, i = share * taken, 0, 0
    while i < len(bins) - 1 and below + bins[i] < need:
        below += bins[i]
        i += 1
    edge = np.float32(i + (need - below) / max(bins[i], 1)) / per_root
    return np.float32(least + edge * edge), least


@numba.njit(cache=True, nogil=True)
def _extend(  # type: ignore[no-untyped-def]
    states, costs, count, bits, mask, code, target, unit, limit, next_states, next_costs, nodes
):
    """Append every candidate that costs less than `limit`; returns how many there are.

    Its node, parent << 8 | symbol, is appended to `nodes`.
    """
    multiplier, addend, shift, second, table = code
    room = len(next_costs) - (LANES << bits)
    kept = 0
    for i in range(0, count, LANES):
        first = mask_word(shift_left(load_words(states, i), np.uint32(bits)), mask)
        product = add_word(multiply_word(first, multiplier), addend)
        cost, origin = load(costs, i), shift_left(count_up(np.uint32(i)), np.uint32(8))
        for b in range(1 << bits):
            branch = add_word(product, np.uint32(b) * multiplier)
            total = _cost(branch, cost, target, unit, shift, second, table)
            state, node = add_word(first, np.uint32(b)), add_word(origin, np.uint32(b))
            kept = append_below(total, limit, state, node, next_costs, next_states, nodes, kept)
        if kept > room:
            break
    return kept


@numba.njit(cache=True, nogil=True)
def _merge(states, costs, nodes, count, edge_mask, heads):  # type: ignore[no-untyped-def]
    """Of paths with one edge, hence one future, keep the cheapest; returns how many are left.

    `heads` maps a hash of the edge to the last path seen with it. An entry is believed only if
    that path's edge is the same, so it never needs clearing; a collision hides a merge at worst.
    """
    left, slots = 0, np.uint64(len(heads) - 1)
    for i in range(count):
        edge = states[i] & edge_mask
        slot = (np.uint64(edge) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(40)) & slots
        head = heads[slot]
        if head < left and states[head] & edge_mask == edge:
            if costs[i] < costs[head]:
                costs[head], states[head], nodes[head] = costs[i], states[i], nodes[i]
        else:
            heads[slot] = left
            costs[left], states[left], nodes[left] = costs[i], states[i], nodes[i]
            left += 1
    return left


@numba.njit(cache=True, nogil=True)
def _collect(nodes, starts, first, last, alive, ranks):  # type: ignore[no-untyped-def]
    """Drop the nodes of steps first .. last - 1 from which no survivor of step last - 1 descends.

    Nodes of step t lie at starts[t] .. starts[t + 1]; those of the last step all stay.
    """
    alive[starts[first] : starts[last - 1]] = 0
    alive[starts[last - 1] : starts[last]] = 1
    for t in range(last - 1, first, -1):
        above = starts[t - 1]
        for i in range(starts[t], starts[t + 1]):
            if alive[i]:
                alive[above + np.int64(nodes[i] >> np.uint32(8))] = 1
    to, parity = starts[first], 0
    for t in range(first, last):
        begin, kept = starts[t], 0
        for i in range(begin, starts[t + 1]):
            if alive[i]:
                node = nodes[i]
                if t > first:
                    rank = ranks[1 - parity, node >> np.uint32(8)]
                    node = (rank << np.uint32(8)) | (node & np.uint32(255))
                nodes[to + kept] = node
                ranks[parity, i - begin] = kept
                kept += 1
        starts[t] = to
        to, parity = to + kept, 1 - parity
    starts[last] = to


@numba.njit(cache=True, nogil=True)
def _search_chain(x, steps, state_bits, code, unit, offset, survivors, out):  # type: ignore[no-untyped-def]
    """Symbols of one chain x (T,) from state 0, levels unit * byte sum - offset."""
    size, branches = len(x), np.int64(1) << steps.max()
    room = np.int64(survivors * ROOM) + LANES * branches
    mask = np.uint32((np.int64(1) << state_bits) - 1)
    states, next_states = np.zeros(room, np.uint32), np.zeros(room, np.uint32)
    costs, next_costs = np.full(room, np.float32(np.inf)), np.zeros(room, np.float32)
    sample, bins = np.zeros(max(SAMPLE, 2 * LANES * branches), np.float32), np.zeros(BINS, np.int64)
    heads = np.zeros(1 << np.int64(np.ceil(np.log2(2 * room))), np.uint32)
    nodes, starts = np.zeros((3 * COLLECT + 1) * room, np.uint32), np.zeros(size + 1, np.int64)
    alive, ranks = np.zeros(len(nodes), np.uint8), np.zeros((2, room), np.uint32)
    count = 1
    costs[0] = 0.0
    for t in range(size):
        bits, target, begin = steps[t], np.float32(x[t] + offset), starts[t]
        limit, least = np.float32(1e30), np.float32(0)
        if count << bits > survivors:
            taken = _sample_costs(states, costs, count, bits, mask, code, target, unit, sample)
            limit, least = _quantile(sample, taken, survivors / (count << bits), bins)
        born = nodes[begin:]
        count = _extend(
            states,
            costs,
            count,
            bits,
            mask,
            code,
            target,
            unit,
            limit,
            next_states,
            next_costs,
            born,
        )
        if t % MERGE == 0:
            edge_bits = state_bits - (steps[t + 1] if t + 1 < size else bits)
            edge_mask = np.uint32((np.int64(1) << edge_bits) - 1)
            count = _merge(next_states, next_costs, born, count, edge_mask, heads)
        states, next_states, costs, next_costs = next_states, states, next_costs, costs
        if t % RENORMALIZE == 0:
            costs[:count] -= least
        costs[count : count + LANES] = np.inf
        starts[t + 1] = begin + count
        if t % COLLECT == COLLECT - 1:
            _collect(nodes, starts, max(0, t + 1 - 2 * COLLECT), t + 1, alive, ranks)
            if starts[t + 1] + (COLLECT + 1) * room > len(nodes):
                nodes = np.concatenate((nodes, np.zeros(len(nodes), np.uint32)))
                alive = np.zeros(len(nodes), np.uint8)
    at = np.int64(np.argmin(costs[:count]))
    for t in range(size - 1, -1, -1):
        node = nodes[starts[t] + at]
        out[t], at = np.uint8(node & np.uint32(255)), np.int64(node >> np.uint32(8))


def _words(code: Code) -> tuple[Any, ...]:
    """Multiplier, addend, shift, second multiplier and table, as `_cost` takes them."""
    if code.name == "weyl":
        shift = np.uint32(32 - trellis_codes.QUANTILE_BITS)
        multiplier = np.uint32(code.multiplier)
        return multiplier, np.uint32(0), shift, np.uint32(1), trellis_codes.quantiles().copy()
    parts = tuple(np.uint32(part) for part in trellis_codes.BYTE_SUM_CODES[code.name])
    return (*parts, np.empty(0, np.float32))


def search(
    x: NDArray[np.float32], steps: NDArray[np.int64], code: Code, survivors: int
) -> NDArray[np.uint8]:
    """Symbols b_t of good paths from state 0 for the chains x (count, T), uint8 of x's shape.

    Args:
        x: targets in standard deviations of the code.
        steps: K_t, new bits of each weight, (T,).
        code: weyl or a byte-sum code.
        survivors: M, paths kept.

    Cost: M 2^K branch metrics a weight. Memory: about 1000 M bytes a thread.
    """
    words = _words(code)
    mean = 0 if code.name == "weyl" else trellis_codes.BYTE_SUM_MEAN
    unit, offset = np.float32(1 / code.sigma), np.float32(mean / code.sigma)
    out = np.empty(x.shape, np.uint8)

    def job(i: int) -> None:
        _search_chain(x[i], steps, code.state_bits, words, unit, offset, survivors, out[i])

    run_jobs(job, len(x), x.shape[1] * survivors << int(steps.max()))
    return out
