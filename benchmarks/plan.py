"""The integer plan: 224 layers by 40 options, solved and proved; brute force on small ones.

    python benchmarks/plan.py

Writes benchmarks/results/plan.json and prints a table. Times are CPU seconds of this process.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from convex_caldera.allocate import Curves, Group, Option, allocate, frontier

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests.oracles.core_replay import no_plan_below

RESULTS = Path(__file__).resolve().parent / "results"
DECAY = 2 * math.log(2)


def curves_of(groups: int, options: int, seed: int, noise: float) -> Curves:
    """Layers of a transformer's shapes; rates at random, distortions around c exp(-k b)."""
    rng = np.random.default_rng(seed)
    made = []
    for g in range(groups):
        weights = int(rng.choice([1024, 2048, 4096]) * rng.choice([1024, 4096, 11008]))
        scale = 1e-2 * math.exp(rng.normal())
        menu = []
        for o in range(options):
            bits = float(rng.uniform(1, 8))
            loss = scale * math.exp(-DECAY * bits + noise * rng.normal())
            menu.append(Option(f"o{o:02d}", int(weights * bits), loss))
        made.append(Group(f"layer.{g:03d}", weights, tuple(menu)))
    return Curves(tuple(made))


def timed(curves: Curves, bits: float) -> dict[str, Any]:
    """One budget: time, gaps, and the replay of both bounds."""
    budget = int(bits * curves.weights)
    start = time.process_time()
    plan = allocate(curves, budget)
    seconds = time.process_time() - start
    menus = [[(o.bits, Fraction(o.distortion)) for o in group.options] for group in curves.groups]
    price = Fraction(plan.price)
    bound = sum(min(d + price * w for w, d in menu) for menu in menus) - price * budget
    start = time.process_time()
    replayed = plan.proof == "price" or (
        plan.core_bound is not None
        and no_plan_below(Fraction(plan.core_bound), menus, price, budget)
    )
    return {
        "bits": bits,
        "seconds": seconds,
        "gap_before_milp": plan.gap_before_milp,
        "plan_gap": plan.plan_gap,
        "core_gap": None if plan.core_bound is None else plan.distortion / plan.core_bound - 1,
        "proof": plan.proof,
        "price_bound_replays": Fraction(plan.bound) <= bound,
        "core_bound_replays": replayed,
        "replay_seconds": time.process_time() - start,
        "unused_bits": budget - plan.bits,
    }


def brute_force_agrees(seed: int) -> bool:
    """A plan of up to six layers against all its combinations, exactly."""
    rng = np.random.default_rng(seed)
    curves = curves_of(int(rng.integers(1, 7)), int(rng.integers(1, 6)), seed, 1.0)
    least = sum(min(o.bits for o in group.options) for group in curves.groups)
    most = sum(max(o.bits for o in group.options) for group in curves.groups)
    budget = int(rng.integers(least, most + 1))
    best = min(
        sum(Fraction(o.distortion) for o in combo)
        for combo in itertools.product(*(group.options for group in curves.groups))
        if sum(o.bits for o in combo) <= budget
    )
    plan = allocate(curves, budget)
    chosen = (curves.group(name).option(label) for name, label in plan.choice.items())
    return sum(Fraction(o.distortion) for o in chosen) == best and plan.bits <= budget


def main() -> None:
    rows = []
    for seed, noise in itertools.product(range(5), (0.0, 0.1, 0.5)):
        curves = curves_of(224, 40, seed, noise)
        start = time.process_time()
        points = len(frontier(curves))
        front = time.process_time() - start
        for bits in (1.8, 2.2, 3.0, 4.0):
            row = {"seed": seed, "noise": noise, "frontier_points": points}
            rows.append(row | {"frontier_seconds": front} | timed(curves, bits))
    agree = [brute_force_agrees(seed) for seed in range(300)]
    summary = {
        "plans": len(rows),
        "largest_seconds": max(row["seconds"] for row in rows),
        "median_seconds": float(np.median([row["seconds"] for row in rows])),
        "median_frontier_seconds": float(np.median([row["frontier_seconds"] for row in rows])),
        "largest_gap_before_milp": max(row["gap_before_milp"] for row in rows),
        "largest_core_gap": max(row["core_gap"] or 0.0 for row in rows),
        "proofs": {p: sum(row["proof"] == p for row in rows) for p in ("price", "core", "milp")},
        "bounds_replayed": sum(
            row["price_bound_replays"] and row["core_bound_replays"] for row in rows
        ),
        "median_replay_seconds": float(np.median([row["replay_seconds"] for row in rows])),
        "brute_force": f"{sum(agree)} of {len(agree)} agree",
    }
    RESULTS.mkdir(exist_ok=True)
    record = {"summary": summary, "rows": rows}
    (RESULTS / "plan.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
