"""The convex program against cone solvers, and how it scales.

    python benchmarks/convex_program.py random --count 200     agreement with cvxpy + Clarabel
    python benchmarks/convex_program.py peers                  time and gap at 16, 32, 64, 96
    python benchmarks/convex_program.py scale --sizes 1024     cost in full SVDs, peak memory
    python benchmarks/convex_program.py search --sizes 256     CPU time to find the mu of a rank

Each writes benchmarks/results/convex_program_<name>.json, and convex_program.md from all of them
that are there. Times are CPU seconds of this process, so that they mean the same on a busy machine;
set OMP_NUM_THREADS=1 for figures that add up.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import platform
import resource
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import torch

from convex_caldera.allocate.program import ProgramSolution, solve_program
from convex_caldera.fit.nuclear_norm import mu_for_rank

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests.oracles.convex_program import (
    BOX_MARGIN,
    TIGHT,
    TINY,
    Instance,
    random_instance,
    solve_by_cone,
)

RESULTS = Path(__file__).resolve().parent / "results"
SECTIONS = {
    "random": "Random joint instances beside CVXPY + Clarabel",
    "scale": "One layer at relative gap 1e-6, in full SVDs of the same matrix",
    "peers": "Side by side with cone solvers",
    "search": "The mu of a rank",
}
RANDOM_TOL = 1e-10  # relative gap; prices converge as its root
FINE = {"iterative_refinement_reltol": 1e-15, "iterative_refinement_abstol": 1e-15}
# Shorter steps, finer refinement and other units save what Clarabel gives up on at first.
CONE_ATTEMPTS: tuple[dict[str, Any], ...] = (
    TIGHT,
    TIGHT | {"max_step_fraction": 0.9},
    TIGHT | FINE | {"iterative_refinement_max_iter": 50},
    {"tol_gap_rel": 1e-8},
    TIGHT | {"max_step_fraction": 0.7, "scaled": True},
)
STATIONARY = 1e-6
OBJECTIVE_TOLERANCE, PRICE_TOLERANCE, BITS_TOLERANCE = 1e-6, 1e-4, 1e-4


def solve(instance: Instance, tol: float) -> tuple[ProgramSolution, float]:
    """Our solution and its CPU seconds."""
    W = [torch.from_numpy(w) for w in instance.W]
    H = [torch.from_numpy(h) for h in instance.H]
    start = time.process_time()
    found = solve_program(W, H, **instance.constants(), tol=tol)
    return found, time.process_time() - start


def violation(instance: Instance, found: ProgramSolution) -> float:
    """The largest relative violation of any constraint of the primal and dual points."""
    used = float(np.dot(instance.p, found.bits))
    worst = [used / instance.budget - 1.0, -found.price]
    for g, (W, H) in enumerate(zip(instance.W, instance.H, strict=True)):
        b, s = found.bits[g], found.multipliers[g]
        left, right = (factor.numpy() for factor in found.low_rank[g])
        E = found.duals[g].apply(torch.from_numpy(W - left @ right) - found.residual[g]).numpy()
        norm = float(np.linalg.norm(E @ H, 2))
        most = instance.lam[g] / instance.kappa[g]
        worst += [instance.b_min[g] - b, b - instance.b_max[g], -s, s / most - 1.0]
        if instance.mu is not None:
            worst.append(norm / float(instance.mu[g]) - 1.0)
        if instance.tau is not None:
            nuclear = float(np.linalg.norm(left @ right, "nuc"))
            worst.append(nuclear / float(instance.tau[g]) - 1.0)
    return max(worst)


def cone_solution(instance: Instance) -> dict[str, Any] | None:
    """Clarabel's first answer if its own multipliers fit it, else that of all attempts which
    really costs least; None if it gives up on all.
    """
    import cvxpy as cp  # an extra, which `scale` and `search` do without

    answers: list[dict[str, Any]] = []
    for options in CONE_ATTEMPTS:
        with contextlib.suppress(cp.SolverError):
            found = solve_by_cone(instance, "CLARABEL", **options)
            answers.append(found)
            fits = found["status"] == "optimal" and found["stationarity"] <= STATIONARY
            if options is TIGHT and fits:
                break
    return min(answers, key=lambda a: a["achieved"], default=None)


def stationarity(instance: Instance, found: ProgramSolution) -> float:
    """Relative error of (lam - kappa s) c k e^{-k b} = nu p where b is inside its box."""
    b, s = np.array(found.bits), np.array(found.multipliers)
    pull = (instance.lam - instance.kappa * s) * instance.c * instance.k * np.exp(-instance.k * b)
    push = found.price * instance.p
    inside = (b > instance.b_min + BOX_MARGIN) & (b < instance.b_max - BOX_MARGIN)
    return float(np.abs(pull - push)[inside].max(initial=0.0) / max(push.max(), TINY))


def compared(seed: int, form: str, most: int) -> dict[str, Any]:
    """One instance solved by both; errors are relative but for bits.

    A price error is relative to the price, or to objective / budget where the budget is slack.
    """
    instance = random_instance(seed, form, most=most)
    found, seconds = solve(instance, RANDOM_TOL)
    row: dict[str, Any] = {
        "seed": seed,
        "form": form,
        "groups": len(instance.W),
        "active": found.price > 0,
        "gap": found.gap,
        "steps": found.steps,
        "seconds": seconds,
        "violation": violation(instance, found),
        "stationarity": stationarity(instance, found) if found.price > 0 else None,
    }
    start = time.process_time()
    oracle = cone_solution(instance)
    row["oracle_seconds"] = time.process_time() - start
    row["oracle_status"] = "gave up" if oracle is None else oracle["status"]
    if oracle is None:
        return row
    unit = found.price or found.primal / instance.budget
    bits = float(np.abs(np.array(found.bits) - oracle["bits"]).max())
    return row | {
        "oracle_above_our_dual": oracle["objective"] / found.dual - 1.0,
        "oracle_stationarity": oracle["stationarity"] if found.price > 0 else None,
        "oracle_violation": oracle["violation"],
        "objective_error": abs(found.primal / oracle["objective"] - 1.0),
        "price_error": abs(found.price - oracle["price"]) / unit,
        "bits_error": bits if found.price > 0 else None,  # otherwise the bits are not unique
    }


def run_random(count: int, most: int) -> dict[str, Any]:
    """Agreement on `count` random instances, half of them in each form."""
    rows = []
    for number in range(count):
        rows.append(compared(1000 + number, ("penalty", "constrained")[number % 2], most))
        if number % 20 == 19:
            print(f"{number + 1} instances", flush=True)
    return {"summary": random_summary(rows), "rows": rows}


def random_summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Where both agree, and what is to be said where they do not."""
    both = [row for row in rows if "objective_error" in row]

    def largest(key: str, of: list[dict[str, Any]]) -> float:
        return max((row[key] for row in of if row[key] is not None), default=0.0)

    def agrees(row: dict[str, Any]) -> bool:
        return (
            row["objective_error"] <= OBJECTIVE_TOLERANCE
            and row["price_error"] <= PRICE_TOLERANCE
            and (row["bits_error"] or 0.0) <= BITS_TOLERANCE
        )

    agreeing, other = [r for r in both if agrees(r)], [r for r in both if not agrees(r)]
    shown = ("seed", "objective_error", "price_error", "bits_error", "gap", "stationarity",
             "oracle_status", "oracle_stationarity", "oracle_violation")  # fmt: skip
    return {
        "instances": len(rows),
        "active_budgets": sum(row["active"] for row in rows),
        "oracle_gave_up": [row["seed"] for row in rows if row["oracle_status"] == "gave up"],
        "oracle_not_optimal": sum(row["oracle_status"] == "optimal_inaccurate" for row in rows),
        "agree": len(agreeing),
        "largest_among_those": {
            key: largest(key, agreeing) for key in ("objective_error", "price_error", "bits_error")
        },
        "others": [{key: row[key] for key in shown} for row in other],
        "largest_gap": largest("gap", rows),
        "largest_stationarity": largest("stationarity", rows),
        "largest_violation": largest("violation", rows),
        "median_seconds": float(np.median([row["seconds"] for row in rows])),
        "median_oracle_seconds": float(np.median([row["oracle_seconds"] for row in rows])),
    }


def square_instance(size: int, seed: int = 0) -> Instance:
    """One group: a few strong directions in noise, inputs of condition 10^4, an active budget."""
    rng = np.random.default_rng(seed)
    rank = max(2, size // 32)
    W = rng.normal(size=(size, size)) / math.sqrt(size)
    W += 3 * rng.normal(size=(size, rank)) @ rng.normal(size=(rank, size)) / size
    Q = np.linalg.qr(rng.normal(size=(size, size)))[0]
    h = np.exp(-np.linspace(0, math.log(1e4), size))
    h = h / h.mean() + 0.01
    H = (Q * h) @ Q.T
    energy = float(np.sum(W * W))
    ones = np.ones(1)
    return Instance(
        [W],
        [H],
        lam=0.5 * energy * ones,
        kappa=0.1 * energy * ones,
        c=4.0 * ones,
        k=2 * math.log(2) * ones,
        p=float(size * size) * ones,
        b_min=ones,
        b_max=8.0 * ones,
        budget=2.2 * size * size,
        mu=0.2 * np.linalg.norm(W @ H, 2) * ones,
    )


def run_peers(sizes: list[int], limit: float) -> dict[str, Any]:
    """Time and distance from the certified optimum of three solvers."""
    rows = []
    for size in sizes:
        instance = square_instance(size)
        solve(instance, 1e-6)  # compiled and warm
        found, seconds = solve(instance, 1e-8)
        rows.append(
            {"size": size, "solver": "convex-caldera", "seconds": seconds, "gap": found.gap}
        )
        for solver, options in (
            ("CLARABEL", {"time_limit": limit}),
            ("SCS", {"eps": 1e-6, "time_limit_secs": limit, "max_iters": 10**6}),
        ):
            row = {"size": size, "solver": f"cvxpy + {solver}"}
            with ProcessPoolExecutor(1) as alone:  # a peer may die for want of memory
                try:
                    answer = alone.submit(peer_answer, instance, solver, options).result()
                except BrokenProcessPool:
                    answer = {"seconds": None, "value": math.nan, "status": "killed: memory"}
            gap = abs(answer.pop("value") / found.primal - 1.0)
            rows.append(row | answer | {"gap": gap if math.isfinite(gap) else None})
            print(rows[-1], flush=True)
    memory = resource.getrlimit(resource.RLIMIT_AS)[0]  # of `ulimit -v`; -1 is none
    return {"limit_seconds": limit, "limit_bytes": memory, "rows": rows}


def peer_answer(instance: Instance, solver: str, options: dict[str, Any]) -> dict[str, Any]:
    """CPU seconds, objective and status of a cone solver; its own failure is a result."""
    start = time.process_time()
    try:
        found = solve_by_cone(instance, solver, **options)
        value, status = found["objective"], found["status"]
    except Exception as error:
        value, status = math.nan, f"{type(error).__name__}: {error}"[:80]
    return {"seconds": time.process_time() - start, "value": value, "status": status}


def run_scale(sizes: list[int], tol: float) -> dict[str, Any]:
    """CPU time in units of a full SVD of the same matrix, and peak memory."""
    solve(square_instance(16), 1e-6)  # compile before measuring
    rows = []
    for size in sizes:
        instance = square_instance(size)
        found, seconds = solve(instance, tol)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"{size}: {seconds:.2f} s, gap {found.gap:.2e}, {peak:.2f} GiB", flush=True)
        W = torch.from_numpy(instance.W[0])
        start = time.process_time()
        torch.linalg.svd(W, full_matrices=False)
        svd = time.process_time() - start
        rows.append(
            {
                "size": size,
                "seconds": seconds,
                "svd_seconds": svd,
                "svds": seconds / svd,
                "gap": found.gap,
                "rank": found.ranks[0],
                "steps": found.steps,
                "price": found.price,
                "peak_gib": peak,
            }
        )
        print(rows[-1], flush=True)
    return {"tol": tol, "rows": rows}


def run_search(sizes: list[int]) -> dict[str, Any]:
    """CPU seconds of the least mu that keeps a rank of a sixteenth, under a full H."""
    rows = []
    for size in [16, *sizes]:  # the first warms up and is not reported
        instance = square_instance(size)
        W, H = torch.from_numpy(instance.W[0]), torch.from_numpy(instance.H[0])
        start = time.process_time()
        mu = mu_for_rank(W, H, size // 16)
        rows.append({"size": size, "seconds": time.process_time() - start, "mu": mu})
    return {"rows": rows[1:]}


def markdown() -> str:
    """All results that are there, as one page."""
    parts = ["# The convex program: agreement, cost, peers", ""]
    for name, title in SECTIONS.items():
        path = RESULTS / f"convex_program_{name}.json"
        if not path.exists():
            continue
        record = json.loads(path.read_text())
        machine = ", ".join(f"{key} {value}" for key, value in record["machine"].items())
        parts += [
            f"## {title}",
            "",
            f"`python benchmarks/convex_program.py {name}` ({machine})",
            "",
        ]
        if name == "random":
            parts += _random_words(record["summary"])
        else:
            parts += _table(record["rows"])
        parts.append("")
    return "\n".join(parts)


def _random_words(s: dict[str, Any]) -> list[str]:
    most = s["largest_among_those"]
    lines = [
        f"{s['instances']} instances, {s['active_budgets']} with an active budget. Ours: relative "
        f"gap at most {s['largest_gap']:.1e}, verified; stationarity "
        f"{s['largest_stationarity']:.1e}; largest violation {s['largest_violation']:.1e}, the "
        "rounding of W - Z - R.",
        "",
        f"CVXPY + Clarabel gave up on {len(s['oracle_gave_up'])}, called {s['oracle_not_optimal']} "
        f"inaccurate, and agrees with us on {s['agree']}: objective within "
        f"{most['objective_error']:.1e}, price within {most['price_error']:.1e}, bits within "
        f"{most['bits_error']:.1e}.",
    ]
    if s["others"]:
        lines += ["", "Those on which it does not, beside the relative residual of either solver "
                  "in (lam - kappa s) c k e^{-k b} = nu p:", ""]  # fmt: skip
    return lines + _table(s["others"])


def _table(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    keys = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(key)) for key in keys] for row in rows]
    lines = [keys, ["---"] * len(keys), *cells]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="name", required=True)
    random = commands.add_parser("random")
    random.add_argument("--count", type=int, default=200)
    random.add_argument("--most", type=int, default=24)
    peers = commands.add_parser("peers")
    peers.add_argument("--sizes", type=int, nargs="+", default=[16, 32, 64, 96])
    peers.add_argument("--limit", type=float, default=300.0, help="seconds per peer and size")
    scale = commands.add_parser("scale")
    scale.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 1024])
    scale.add_argument("--tol", type=float, default=1e-6)
    search = commands.add_parser("search")
    search.add_argument("--sizes", type=int, nargs="+", default=[128, 256, 512])
    commands.add_parser("page")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.name == "page":
        (RESULTS / "convex_program.md").write_text(markdown())
        return
    if options.name == "random":
        result = run_random(options.count, options.most)
    elif options.name == "peers":
        result = run_peers(options.sizes, options.limit)
    elif options.name == "search":
        result = run_search(options.sizes)
    else:
        result = run_scale(options.sizes, options.tol)
    machine = {"threads": torch.get_num_threads(), "python": platform.python_version()}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"convex_program_{options.name}.json"
    path.write_text(json.dumps({"machine": machine, **result}, indent=1) + "\n")
    (RESULTS / "convex_program.md").write_text(markdown())
    print(json.dumps(result.get("summary", result["rows"]), indent=1))


if __name__ == "__main__":
    main()
