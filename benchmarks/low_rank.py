"""What low-rank bits buy: loss at equal bytes for metrics, factor rates and ranks.

    python benchmarks/low_rank.py [--data DIR] [--models bundled ...] [--blocks 0 3] [--bits 2]

Each entry is the Kronecker-curvature loss of a layer with a low-rank term, times 4^(its bits per
weight), over the loss without one: below 1 the bits do more as factors than as codes. Reported is
the geometric mean over the linear layers of the blocks, and what the spectrum alone predicts
(allocate.rank_energy). Models below --data are skipped, and the table says so, where absent.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from transformers import AutoTokenizer

from convex_caldera.allocate.rank_energy import factor_noise, log_energies, spectrum
from convex_caldera.calibrate.curvature import sequence_curvature
from convex_caldera.calibrate.text import token_windows
from convex_caldera.core.problem import Problem
from convex_caldera.core.recipe import FactorCoding, FitLowRank, Quantize, Recipe
from convex_caldera.fit.backfit import fit_layer
from convex_caldera.models.original import load_original
from convex_caldera.models.resolve import resolve_model
from convex_caldera.models.skeleton import Skeleton
from convex_caldera.quantizers.e8p import E8P
from convex_caldera.quantizers.trellis import Trellis
from convex_caldera.recipes.convex import STATE_BITS, trellis_recipe
from convex_caldera.transforms.hadamard import RandomizedHadamard
from convex_caldera.workflow.planning import layer_bytes

CASES = {
    "bundled": "bundled:calibration",
    "models/TinyStories-656K": "text/tinystories_train_2mb.txt",
    "models/wiki-llama-14m": "text/c4_sample_a.txt",
}
COSTS = (0.125, 0.25, 0.5, 0.8)  # factor bits per weight
# metric, factors' quantizer, sweeps
VARIANTS = {
    "SVD under H, E8P 4 bits, 2 sweeps": ("full", E8P(4), 2),
    "SVD under H, trellis 2 bits": ("full", Trellis(2.0, STATE_BITS), 1),
    "SVD of W, E8P 4 bits": ("identity", E8P(4), 1),
    "SVD of W, trellis 3 bits": ("identity", Trellis(3.0, STATE_BITS), 1),
    "SVD of W, trellis 2 bits": ("identity", Trellis(2.0, STATE_BITS), 1),
    "SVD of W, trellis 1.5 bits": ("identity", Trellis(1.5, STATE_BITS), 1),
}


def recipe_of(bits: float, rank: int, metric: str, quantizer: object, sweeps: int) -> Recipe:
    factors = FitLowRank(rank, metric, FactorCoding(quantizer, 2))
    codes = Quantize(Trellis(bits, STATE_BITS), "full")
    return Recipe((factors, codes), (RandomizedHadamard(),), sweeps)


def rank_at(cost: float, factor_bits: float, shape: tuple[int, int]) -> int:
    m, n = shape
    return min(max(1, round(cost * m * n / (factor_bits * (m + n)))), min(m, n) // 2)


def measure(problem: Problem, name: str, bits: float) -> dict[str, float]:
    """Log of loss x 4^bits over the loss without low rank; and of what the spectrum predicts."""
    shape = (problem.W.shape[0], problem.W.shape[1])
    plain = trellis_recipe(bits)
    names = {"seed": 0, "layer": name, "site": name}
    base, least = fit_layer(problem, plain, **names).loss, layer_bytes(plain, shape)
    squares, rows = spectrum(problem.W), {}
    for label, (metric, quantizer, sweeps) in VARIANTS.items():
        for cost in COSTS:
            rank = rank_at(cost, quantizer.bits, shape)
            recipe = recipe_of(bits, rank, metric, quantizer, sweeps)
            extra = 8 * (layer_bytes(recipe, shape) - least) / problem.W.numel()
            loss = fit_layer(problem, recipe, **names).loss
            rows[f"{label}|{cost}"] = math.log(loss / base) + extra * math.log(4)
            if label == "SVD of W, trellis 2 bits":
                (said,) = log_energies(squares, [rank], factor_noise(2))
                rows[f"predicted by the spectrum|{cost}"] = said + extra * math.log(4)
    return rows


def run_model(name: str, args: argparse.Namespace) -> dict[str, float]:
    """Geometric means over the layers of the blocks asked for."""
    place = name if name.startswith("bundled") else str(args.data / name)
    text = CASES[name] if CASES[name].startswith("bundled") else str(args.data / CASES[name])
    path = resolve_model(place)
    skeleton = Skeleton(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokens = token_windows(text, tokenizer, args.nsamples, 256, allow_short=True)
    wanted = [s.name for s in skeleton.sites if s.block in args.blocks]
    model = load_original(path, torch.float32, "cpu")
    curvature = sequence_curvature(model, tokens, wanted, seed=0)
    sums: dict[str, float] = {}
    for layer in wanted:
        W = model.get_submodule(layer).weight.detach().float()
        hessian, output = curvature[layer].hessians(layer)
        for key, value in measure(Problem(W, hessian, layer, output), layer, args.bits).items():
            sums[key] = sums.get(key, 0.0) + value / len(wanted)
        print(f"{name} {layer}", flush=True)
    return {key: round(math.exp(value), 4) for key, value in sums.items()}


def table(results: dict[str, dict[str, float] | str]) -> str:
    lines = []
    for name, rows in results.items():
        lines += [f"### {name}", ""]
        if isinstance(rows, str):
            lines += [rows, ""]
            continue
        labels = [*VARIANTS, "predicted by the spectrum"]
        lines.append("| low-rank term | " + " | ".join(f"{c} bits" for c in COSTS) + " |")
        lines.append("|---" * (len(COSTS) + 1) + "|")
        for label in labels:
            cells = " | ".join(f"{rows[f'{label}|{cost}']:.3f}" for cost in COSTS)
            lines.append(f"| {label} | {cells} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=None)
    parser.add_argument("--models", nargs="+", default=list(CASES))
    parser.add_argument("--blocks", nargs="+", type=int, default=[0, 4])
    parser.add_argument("--bits", type=float, default=2.0)
    parser.add_argument("--nsamples", type=int, default=48)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/low_rank.json"))
    args = parser.parse_args()
    results: dict[str, dict[str, float] | str] = {}
    for name in args.models:
        absent = not name.startswith("bundled") and not (args.data and (args.data / name).is_dir())
        results[name] = "skipped: not there" if absent else run_model(name, args)
    args.out.write_text(json.dumps({"bits": args.bits, "models": results}, indent=1) + "\n")
    head = (
        f"Loss x 4^(factor bits) over the loss without low rank, codes of {args.bits:g} bits; "
        "below 1 the bits do more as factors than as codes.\n\n"
    )
    args.out.with_suffix(".md").write_text(head + table(results))


if __name__ == "__main__":
    main()
