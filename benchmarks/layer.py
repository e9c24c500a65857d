"""One large matrix through CALDERA: time and memory per phase, and the estimate for a 7B model.

    python benchmarks/layer.py [--size 4096] [--rank 128] [--sweeps 2] [--device cpu]
                               [--out benchmarks/results/layer.json]

2-bit E8P, factors at 4 bits, Hadamard on both sides, on a synthetic weight and a Hessian with
a power-law spectrum. One sweep is one low-rank step and one rounding; the phases of a run with
more sweeps scale with their number. The 7B estimate multiplies the time per weight by the 6.48e9
weights in the linear layers of Llama-2-7B; larger inputs cost more per weight, so it is rough.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import time
from collections import defaultdict
from pathlib import Path

import torch

from convex_caldera.core.hessian import Hessian
from convex_caldera.core.problem import Problem
from convex_caldera.fit import backfit
from convex_caldera.recipes.lattice import caldera_recipe

LINEAR_WEIGHTS_7B = 6_476_005_376
# What is timed, by the name it has in the driver.
PHASES = ("fit_low_rank", "fit_coded_factors", "round_ldlq", "refine", "block_unit_upper",
          "_enter", "downdated")  # fmt: skip


class Stopwatch:
    """Wraps functions of the driver's module and adds up their seconds."""

    def __init__(self, device: str):
        self.seconds: dict[str, float] = defaultdict(float)
        self._device = device

    def wrap(self, module, name: str) -> None:
        inner = getattr(module, name)

        def timed(*args, **kwargs):
            start = time.monotonic()
            result = inner(*args, **kwargs)
            if self._device != "cpu":
                torch.cuda.synchronize()
            self.seconds[name] += time.monotonic() - start
            return result

        setattr(module, name, timed)


def problem(size: int, device: str) -> Problem:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(size, size, generator=generator)
    X = torch.randn(2 * size, size, generator=generator)
    X *= torch.arange(1, size + 1).float() ** -0.5
    H = (X.T @ X / len(X)).double()
    return Problem(W.to(device), Hessian(H.to(device)), "layer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--sweeps", type=int, default=2)
    parser.add_argument("--refinement", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/layer.json"))
    args = parser.parse_args()
    case = problem(args.size, args.device)
    recipe = caldera_recipe(2, args.rank, 4, args.sweeps, args.refinement)
    watch = Stopwatch(args.device)
    for name in PHASES:
        watch.wrap(backfit, name)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.monotonic()
    fit = backfit.fit_layer(case, recipe, seed=0, layer="layer", site="layer")
    total = time.monotonic() - start
    per_weight = total / args.size**2
    record = {
        "size": args.size,
        "rank": args.rank,
        "sweeps": args.sweeps,
        "refinement": args.refinement,
        "device": args.device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "seconds": {**watch.seconds, "total": total},
        "peak_memory_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "memory_before_bytes": 1024 * before,
        "bits_per_weight": 8 * fit.layer.stored_bytes() / args.size**2,
        "relative_loss": fit.relative_loss,
        "hours_for_7b": per_weight * LINEAR_WEIGHTS_7B / 3600,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    rows = "\n".join(f"| {name} | {value:.1f} |" for name, value in record["seconds"].items())
    text = (
        f"{args.size} x {args.size}, rank {args.rank}, {args.sweeps} sweeps, {args.device}: "
        f"{record['bits_per_weight']:.3f} bits, relative loss {fit.relative_loss:.4f}, peak "
        f"{record['peak_memory_bytes'] / 1e9:.2f} GB; about {record['hours_for_7b']:.1f} h for "
        f"7B\n\n| phase | s |\n|---|---|\n{rows}\n"
    )
    args.out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
