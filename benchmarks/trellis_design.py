"""Find the constants of the trellis codes: `weyl`'s multipliers by seeded random search.

A multiplier M is worth trying for state length L and K bits if the 2^K multiples of M (levels
that follow one path) and the 2^K multiples of M 2^(L-K) (levels of paths that meet) are spread
over the circle of 2^32 without a gap below `SPREAD` of the even one. Of those, the least
distortion of a Gaussian wins, over the rates from K bits to below K + 1 that will take it, in
rounds that keep a quarter and look four times as closely. (Those in use for states longer than 10
bits were searched at K bits alone; with --upper, at rates from K + 1/2 on.)

    python benchmarks/trellis_design.py --state-bits 8 10 12 14 16 --bits 1 2 3 4

With --train the levels of the code "table" are trained instead, and compared with weyl's from
which they start: what 2^L numbers gain over a multiplication.

    python benchmarks/trellis_design.py --train --state-bits 8 10 12 --bits 1 2 3 4
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from convex_caldera.quantizers import (
    Trellis,
    trellis_beam,
    trellis_codes,
    trellis_stream,
    trellis_table,
    trellis_viterbi,
)
from convex_caldera.quantizers.distortion import gaussian_distortion
from convex_caldera.recipes.convex import MEASURING_STATE_BITS, STATE_BITS, expected_of_trial

SPREAD = 0.35


def gap(multiple: int, bits: int) -> float:
    """Least gap between the first 2^bits multiples on the circle, 1 if they are even."""
    points = np.sort(np.array([k * multiple % 2**32 for k in range(1 << bits)], dtype=np.float64))
    gaps = np.diff(np.append(points, points[0] + 2.0**32))
    return float(gaps.min()) * (1 << bits) / 2**32


def is_spread(multiplier: int, state_bits: int, bits: int) -> bool:
    meeting = (multiplier << (state_bits - bits)) % 2**32
    return min(gap(multiplier, bits), gap(meeting, bits)) >= SPREAD


# Sixteenths above a whole rate at which its multiplier is tried: from there on, or from halfway.
FROM_WHOLE, FROM_HALF = (0, 4, 8, 12, 15), (8, 12, 15)


def served(multiplier: int, state_bits: int, bits: int, args: argparse.Namespace) -> float:
    """Mean distortion ratio over the rates that take this multiplier."""
    parts = (0,) if bits == 8 else FROM_HALF if args.upper else FROM_WHOLE
    found = [
        ratio(multiplier, state_bits, bits + part / 16, args.tiles, args.survivors)
        for part in parts
    ]
    return sum(found) / len(found)


def ratio(multiplier: int, state_bits: int, bits: float, tiles: int, survivors: int) -> float:
    """Distortion of a Gaussian over 4^-bits; the same data for every multiplier."""
    scale = np.float32(trellis_codes.best_spread(bits))
    exact = state_bits <= trellis_codes.TABLE_STATE_BITS
    shape = (tiles, 256) if exact else (2, 128 * tiles)
    x = np.random.default_rng(7).standard_normal(shape).astype(np.float32)
    steps = trellis_stream.step_bits(round(16 * bits), shape[1])
    code = trellis_codes.Code("weyl", state_bits, multiplier)
    if exact:
        table = trellis_codes.computed_levels(code, np.arange(1 << state_bits, dtype=np.uint32))
        symbols = trellis_viterbi.search(x / scale, steps, table, state_bits, chained=False)
    else:
        symbols = trellis_beam.search(x / scale, steps, code, survivors)
    states = trellis_table.states_of(symbols, steps, state_bits, laps=2 if exact else 1)
    values = trellis_codes.computed_levels(code, states)
    return float(np.mean((x - scale * values) ** 2)) * 4.0**bits


def trained(state_bits: int, bits: float) -> tuple[float, float, float]:
    """Distortion ratios of weyl and of a trained table, table not counted, and seconds to train."""
    began = time.perf_counter()
    trellis_table.trained_levels(state_bits, round(16 * bits))
    seconds = time.perf_counter() - began
    weyl, table = (
        gaussian_distortion(Trellis(bits, state_bits, code), (2048, 256), seed=7)[0] * 4.0**bits
        for code in ("weyl", "table")
    )
    return weyl, table, seconds


def of_trial(bits: float) -> float:
    """Distortion with the states of a plan's layers over that with those of its trials."""
    plan, trial = (
        gaussian_distortion(Trellis(bits, state_bits), (1024, 256), seed=0)[0]
        for state_bits in (STATE_BITS, MEASURING_STATE_BITS)
    )
    return plan / trial


def find(state_bits: int, bits: int, args: argparse.Namespace) -> int:
    rng = np.random.default_rng([args.seed, state_bits, bits])
    pool: list[int] = []
    while len(pool) < args.candidates:
        multiplier = int(rng.integers(1 << 31, 1 << 32)) | 1
        if is_spread(multiplier, state_bits, bits):
            pool.append(multiplier)
    args = argparse.Namespace(**vars(args))
    while len(pool) > 1:
        scores = sorted((served(m, state_bits, bits, args), m) for m in pool)
        pool = [m for _, m in scores[: max(len(pool) // 4, 1)]]
        args.tiles *= 4
    return pool[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--state-bits", type=int, nargs="+", default=[8, 10, 12, 14, 16])
    parser.add_argument("--bits", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--candidates", type=int, default=64)
    parser.add_argument("--tiles", type=int, default=16)
    parser.add_argument("--survivors", type=int, default=512)
    parser.add_argument("--upper", action="store_true", help="for the rates from K + 1/2 on")
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--trial", action="store_true")
    args = parser.parse_args()
    if args.trial:
        for sixteenths in range(16, 129, 2):
            bits = sixteenths / 16
            found, used = of_trial(bits), expected_of_trial(bits)
            print(f"{bits:g} bits: {found:.3f}, {used:.3f} is used", flush=True)
        return
    for state_bits in args.state_bits:
        for bits in args.bits:
            if args.train:
                weyl, table, seconds = trained(state_bits, bits)
                words = f"weyl {weyl:.4f}, trained {table:.4f}, {seconds:.2f} s"
                print(f"L={state_bits} K={bits}: {words}", flush=True)
                continue
            began = time.perf_counter()
            best = find(state_bits, bits, args)
            closely = argparse.Namespace(**{**vars(args), "tiles": 256})
            final = served(best, state_bits, bits, closely)
            seconds = time.perf_counter() - began
            print(
                f"({state_bits}, {bits}): 0x{best:08X},  # {final:.4f}  {seconds:.0f} s", flush=True
            )


if __name__ == "__main__":
    main()
