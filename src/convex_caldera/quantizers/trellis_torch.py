"""The trellis in plain torch, for tensors on devices other than the CPU: search and decoding.

The search is that of `trellis_viterbi`, state for state: the same passes, reaches and tags, so
that the same tiles get the same codes wherever they are, up to costs that differ by the rounding
of a fused multiply-add. All tiles of a batch take a step together, six operators long:

    cost_t[e] = min over k of  cost_{t-1}[s >> K_t] + (level(s) - x_t)^2,   s = k 2^(L-K_{t+1}) + e

Memory: a tile of T weights holds a uint8 winner for each of its T 2^(L-K) edges, or of the 8 L
weights before the cut where those are more, and 16 bytes a state while it takes a step: at L = 16
and 2 bits 4 MiB + 1 MiB a tile of 256. As many tiles go together as fit `SEARCH_BYTES`.

Decoding is random access: of 40 bits that a gather brings, the L of the window are cut out by one
shift and mask, and the level is computed from them (`trellis_codes`) in 64-bit integers. About
32 bytes a weight are in use at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from convex_caldera.quantizers import trellis_codes
from convex_caldera.quantizers.trellis_codes import Code
from convex_caldera.quantizers.trellis_stream import TILE, step_ends
from convex_caldera.quantizers.trellis_viterbi import (
    CUT_REACH,
    FORBIDDEN,
    RENORMALIZE,
    SETTLE_REACH,
)

SEARCH_BYTES = 1 << 31  # of all tiles that are searched together
DECODE_WEIGHTS = 1 << 24  # decoded at once
_BEFORE = 32  # bits before a tile that its first windows may see; L <= 28
_WORD = 40  # bits gathered at a byte boundary: L + 7 <= 35 of them are used
_LOW = 0xFFFFFFFF

Steps = NDArray[np.int64]
# (costs, targets, levels, K_t, K_{t+1}) -> (costs, winners), as `advance`
Advance = Callable[[Tensor, Tensor, Tensor, int, int], tuple[Tensor, Tensor]]


def advance(
    costs: Tensor, target: Tensor, levels: Tensor, bits: int, next_bits: int
) -> tuple[Tensor, Tensor]:
    """One step of all tiles: a pure function of tensors, fit for `torch.compile`.

    Args:
        costs: of the edges before it, (tiles, 2^(L - bits)), float32, not negative.
        target: (tiles,).
        levels: of all states, (2^L,).

    Returns costs (tiles, 2^(L - next_bits)) and which of the 2^next_bits competitors won, uint8.
    Costs are not negative, so their bit patterns order as they do, and the winner's number
    travels in the low bits of its cost.
    """
    tiles, count = costs.shape[0], 1 << next_bits
    difference = (levels - target[:, None]).view(tiles, -1, 1 << bits)
    total = torch.addcmul(costs[:, :, None], difference, difference)
    tags = torch.arange(count, dtype=torch.int32, device=costs.device)[:, None]
    pattern = total.view(torch.int32).view(tiles, count, -1)
    best = torch.bitwise_and(pattern, -count).bitwise_or_(tags).amin(1)
    return best.view(torch.float32), torch.bitwise_and(best, count - 1).to(torch.uint8)


def search(
    x: Tensor,
    steps: Steps,
    levels: Tensor,
    state_bits: int,
    chained: bool,
    step: Advance = advance,
) -> Tensor:
    """Symbols b_t of the paths nearest to the sequences x (count, T), uint8 of x's shape.

    Args:
        steps: K_t, new bits of each weight, (T,); their sum is at least L.
        levels: level of every state, (2^L,), on x's device.
        chained: start from state 0 and end anywhere, instead of ending where it starts.
        step: `advance`, or what `torch.compile` makes of it.

    Cost: 2^L branch metrics a weight, 16 L weights more for a tail-biting sequence.
    """
    reach, lag = CUT_REACH * state_bits, SETTLE_REACH * state_bits
    held = min(2 * lag, x.shape[1]) if chained else max(x.shape[1], reach)
    each = (held << (state_bits - int(steps.min()))) + (16 << state_bits)
    along = _chained if chained else _tail_biting
    parts = x.split(max(1, SEARCH_BYTES // each))
    return torch.cat([along(part, steps, levels, state_bits, step) for part in parts])


def _forward(
    x: Tensor, steps: Steps, following: int, levels: Tensor, costs: Tensor, step: Advance, skip: int
) -> tuple[Tensor, list[Tensor]]:
    """All steps over targets x (T, tiles): final costs, and the winners from step `skip` on."""
    winners = []
    for t, bits in enumerate(steps.tolist()):
        next_bits = int(steps[t + 1]) if t + 1 < len(steps) else following
        costs, won = step(costs, x[t], levels, bits, next_bits)
        if t >= skip:
            winners.append(won)
        if t % RENORMALIZE == RENORMALIZE - 1:
            costs = costs - costs.amin(1, keepdim=True)
    return costs, winners


def _trace(
    winners: list[Tensor], steps: Steps, following: int, state_bits: int, edges: Tensor
) -> tuple[Tensor, Tensor]:
    """Walk back from the final `edges` (tiles,): symbols (tiles, T) and the edge they left from."""
    states = []
    for t in range(len(steps) - 1, -1, -1):
        next_bits = int(steps[t + 1]) if t + 1 < len(steps) else following
        won = winners[t].gather(1, edges[:, None])[:, 0]
        states.append(torch.add(edges, won, alpha=1 << (state_bits - next_bits)))
        edges = states[-1] >> int(steps[t])
    masks = torch.from_numpy((1 << steps) - 1).to(edges.device)
    return (torch.stack(states[::-1], 1) & masks).to(torch.uint8), edges


def _tail_biting(x: Tensor, steps: Steps, levels: Tensor, state_bits: int, step: Advance) -> Tensor:
    """Closed paths: a window with free ends around the cut tells where to cut, then the tile."""
    size, reach, across = len(steps), CUT_REACH * state_bits, x.T.contiguous()
    window = np.arange(-reach, reach) % size
    following = int(steps[reach % size])
    around = across[torch.from_numpy(window).to(x.device)]
    free = x.new_zeros((len(x), 1 << (state_bits - int(steps[window[0]]))))
    costs, winners = _forward(around, steps[window], following, levels, free, step, reach)
    half = steps[window[reach:]]
    edges = _trace(winners, half, following, state_bits, costs.argmin(1))[1]

    del winners
    shape = (len(x), 1 << (state_bits - int(steps[0])))
    forced = x.new_full(shape, float(FORBIDDEN)).scatter(1, edges[:, None], 0.0)
    _, winners = _forward(across, steps, int(steps[0]), levels, forced, step, 0)
    return _trace(winners, steps, int(steps[0]), state_bits, edges)[0]


def _chained(x: Tensor, steps: Steps, levels: Tensor, state_bits: int, step: Advance) -> Tensor:
    """Paths from state 0 with a free end, settled 20 L symbols at a time, 20 L later."""
    size, lag, across = len(steps), SETTLE_REACH * state_bits, x.T.contiguous()
    costs = x.new_full((len(x), 1 << (state_bits - int(steps[0]))), float(FORBIDDEN))
    costs[:, 0] = 0.0
    done: list[Tensor] = []
    winners: list[Tensor] = []
    settled = seen = 0
    while settled < size:
        upto = min(size, settled + 2 * lag)
        following = int(steps[upto]) if upto < size else int(steps.min())
        part = across[seen:upto], steps[seen:upto]
        costs, more = _forward(*part, following, levels, costs, step, 0)
        winners, seen = winners + more, upto
        edges = costs.argmin(1)
        symbols, _ = _trace(winners, steps[settled:seen], following, state_bits, edges)
        count = seen - settled if seen == size else lag
        done.append(symbols[:, :count])
        winners, settled = winners[count:], settled + count
    return torch.cat(done, 1)


def write_symbols(symbols: Tensor, steps: Steps, size: int) -> Tensor:
    """Symbols (tiles, T), K_t bits each, as bytes (tiles, size), most significant bit first."""
    of_bit = np.repeat(np.arange(len(steps)), steps)
    shifts = (np.cumsum(steps)[of_bit] - 1 - np.arange(len(of_bit))).astype(np.uint8)
    device = symbols.device
    bits = symbols[:, torch.from_numpy(of_bit).to(device)] >> torch.from_numpy(shifts).to(device)
    bits = torch.nn.functional.pad(bits & 1, (0, 8 * size - len(of_bit)))
    places = torch.arange(7, -1, -1, dtype=torch.uint8, device=device)
    return (bits.view(len(symbols), size, 8) << places).sum(2).to(torch.uint8)


def decode(
    codes: Tensor,
    shape: tuple[int, int],
    sixteenths: int,
    code: Code,
    chain: int,
    levels: Tensor | None = None,
) -> Tensor:
    """Levels (m, d) float32 of codes (tile rows, blocks * tile bytes) of a matrix of `shape`.

    `levels` (2^L,) float32 on codes' device, if given, are taken instead of the code's own; the
    result is differentiable in them.
    """
    (m, d), step = shape, 2 * sixteenths
    tiles = codes.view(len(codes), -1, step)
    tall, wide = m // TILE * TILE, d // TILE
    # tiles of chains are read as if the last were whole, tail-biting ones as long as they are
    rows = [slice(0, m)] if chain else [slice(0, tall), slice(tall, m)]
    run = TILE * max(chain, 1) * max(DECODE_WEIGHTS // (TILE * max(chain, 1) * max(d, 1)), 1)
    bands = [slice(i, min(i + run, r.stop)) for r in rows for i in range(r.start, r.stop, run)]
    out = torch.empty((m, d), dtype=torch.float32, device=codes.device)
    for band in bands:
        height = TILE if chain else min(TILE, band.stop - band.start)
        for blocks, width in ((slice(0, wide), TILE), (slice(wide, None), d % TILE)):
            part = tiles[band.start // TILE : -(-band.stop // TILE), blocks]
            if part.numel() and width:
                states = read_states(part, height, width, sixteenths, code.state_bits, chain)
                states = states.reshape(-1, part.shape[1] * width)[: band.stop - band.start]
                left = (blocks.start or 0) * TILE
                found = levels_of(states, code) if levels is None else levels[states]
                out[band, left : left + states.shape[1]] = found
    return out


def read_states(
    codes: Tensor, height: int, width: int, sixteenths: int, state_bits: int, chain: int
) -> Tensor:
    """States (tile rows, height, blocks, width), int64, of tiles of one size.

    Args:
        codes: (tile rows, blocks, bytes), uint8, the top tile row the first of a chain.
        height, width: of every tile; in chains all but the last tile row are 16 high.
    """
    ends = step_ends(sixteenths, height * width)
    before = _bits_before(codes, int(ends[-1]), chain)
    prefix = before[..., None] >> torch.arange(24, -8, -8, device=codes.device) & 255
    used = codes[..., : -(-int(ends[-1]) // 8)].long()
    stream = torch.nn.functional.pad(torch.cat([prefix, used], -1), (0, _WORD // 8 - 1))
    count = stream.shape[-1] - _WORD // 8 + 1
    words = stream.new_zeros((*stream.shape[:-1], count))
    for byte in range(_WORD // 8):
        words |= stream[..., byte : byte + count] << (_WORD - 8 - 8 * byte)
    starts = torch.from_numpy(ends + (_BEFORE - state_bits)).to(codes.device)
    states = words.index_select(-1, starts >> 3)
    states = states >> (_WORD - state_bits - (starts & 7)) & ((1 << state_bits) - 1)
    return states.view(*codes.shape[:2], height, width).transpose(1, 2)


def _bits_before(codes: Tensor, size: int, chain: int) -> Tensor:
    """The `_BEFORE` bits ahead of each tile, (tile rows, blocks) int64, the latest lowest."""
    back = np.arange(_BEFORE, 0, -1)  # bits before the tile's first one
    index = (-back) % size
    found = codes[..., torch.from_numpy(index >> 3).to(codes.device)]
    bits = (found >> torch.from_numpy((7 - (index & 7)).astype(np.uint8)).to(codes.device)) & 1
    bits = bits.long() << torch.arange(_BEFORE - 1, -1, -1, device=codes.device)
    if chain == 0:
        return bits.sum(-1)
    before = bits.new_zeros(codes.shape[:2])
    place = torch.arange(len(codes), device=codes.device) % chain
    for above in range(1, -(-_BEFORE // size) + 1):  # tiles that these bits reach back into
        mine = torch.from_numpy((-(-back // size) == above).astype(np.int64)).to(codes.device)
        part = (bits * mine).sum(-1)
        shifted = torch.cat([torch.zeros_like(part[:above]), part])[: len(codes)]
        before += torch.where((place >= above)[:, None], shifted, 0)
    return before


def levels_of(states: Tensor, code: Code) -> Tensor:
    """Levels of int64 states by the formulas of `trellis_codes`, float32 and exact."""
    if code.name == "weyl":
        x = (states * code.multiplier) & _LOW
        return _quantiles(states.device)[x >> (32 - trellis_codes.QUANTILE_BITS)]
    if code.name == "table":
        return torch.from_numpy(code.table().copy()).to(states.device)[states]
    if code.name in trellis_codes.BYTE_SUM_CODES:
        multiplier, addend, shift, second = trellis_codes.BYTE_SUM_CODES[code.name]
        x = (states * multiplier + addend) & _LOW
        if shift:
            x = (x ^ (x >> shift)) * second & _LOW  # wraps modulo 2^64, which 2^32 divides
        pairs = (x & 0x00FF00FF) + (x >> 8 & 0x00FF00FF)
        total = (pairs & 0xFFFF) + (pairs >> 16)
        return (total - trellis_codes.BYTE_SUM_MEAN).float()
    x = states * (0xCBAC1FED if code.name == "mcg" else 89226354)
    x = (x + (0 if code.name == "mcg" else 64248484)) & 0x8FFF8FFF ^ 0x3B603B60
    low, high = x & 0xFFFF, x >> 16
    return _half(low) + _half(high)


def _half(pattern: Tensor) -> Tensor:
    """Half-precision numbers of 16-bit patterns, float32."""
    return (pattern - (pattern >> 15 << 16)).to(torch.int16).view(torch.float16).float()


@lru_cache(maxsize=8)
def _quantiles(device: torch.device) -> Tensor:
    return torch.from_numpy(trellis_codes.quantiles().copy()).to(device)


@lru_cache(maxsize=8)
def unit_levels(code: Code, device: torch.device) -> Tensor:
    """Levels of all 2^L states in standard deviations, as the search takes them."""
    return torch.from_numpy(code.table() / np.float32(code.sigma)).to(device)
