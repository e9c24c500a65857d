"""The LQER family measured: formats, layers, bits, the exact route's time, quality at W4A8.

    python benchmarks/lqer.py [--parts formats bits layers root quality] [--sizes 1024 2048]
                              [--models bundled]
                              [--out benchmarks/results/lqer.json]

formats  error on N(0, 1) and stored bits of MXINT, integers, NormalFloat, minifloats
bits     average bits of Llama-2-7B's layers, per original weight
layers   the bundled model: seconds of profile and approximate, and every layer's output error
root     QERA-exact at n x n: one low-rank fit here, and the published route (scipy's Schur root
         of H, SVD of the scaled error, solve); one thread, CPU seconds
quality  perplexity and KL of every method at W4A16, W4A8, W4A6, W2A8, from stored models

Parts that are not asked for keep their figures in the output file.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from convex_caldera.calibrate.collect import collect
from convex_caldera.core.problem import Problem
from convex_caldera.evaluate.table import plain_table
from convex_caldera.fit.backfit import fit_layer
from convex_caldera.fit.low_rank import fit_low_rank
from convex_caldera.models.resolve import resolve_model
from convex_caldera.models.skeleton import Skeleton
from convex_caldera.quantizers import MXInt
from convex_caldera.quantizers.distortion import gaussian_distortion
from convex_caldera.recipes import lqer
from convex_caldera.recipes.formats import parse_format
from convex_caldera.storage.codec import recipe_layout
from convex_caldera.workflow.compress import calibration_tokens, compress_to
from convex_caldera.workflow.evaluating import evaluate_models
from convex_caldera.workflow.settings import make_settings

RECIPES: dict[str, Callable[..., Any]] = {
    "no-lqer": lambda quantizer, rank: lqer.no_lqer_recipe(quantizer),
    "lqer": lqer.lqer_recipe,
    "l2qer": lqer.l2qer_recipe,
    "qera-approx": lqer.qera_approx_recipe,
    "qera-exact": lqer.qera_exact_recipe,
}
FORMATS = [
    *(f"mxint{bits}/{block}" for bits in (2, 3, 4, 6, 8) for block in (16, 32, 128)),
    *(f"{family}{bits}/128" for family in ("int", "sint") for bits in (2, 3, 4, 8)),
    "nf4/64", "e2m1/32", "e4m3/32",
]  # fmt: skip
LLAMA_2_7B = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
RANK = 8  # a thirty-second of the bundled model's width, as 128 is of 4096
PRECISIONS = ("W4A16", "W4A8", "W4A6", "W2A8")


def formats() -> list[dict[str, Any]]:
    rows = []
    for name in FORMATS:
        error, bits = gaussian_distortion(parse_format(name).quantizer())
        rows.append({"format": name, "mse": error, "bits": bits, "over_shannon": error * 4**bits})
    return rows


def bits() -> list[dict[str, Any]]:
    """Stored bits per original weight, and what dividing by weights plus factors would say."""
    rows = []
    for exponent in (8, 4):
        recipe = lqer.l2qer_recipe(MXInt(4, 16, exponent), 32, MXInt(8, 16, exponent))
        layouts = [recipe_layout(recipe, shape)[1] for shape in LLAMA_2_7B]
        stored = sum(math.prod(s) * d.itemsize for layout in layouts for d, s in layout.values())
        weights = sum(m * n for m, n in LLAMA_2_7B)
        factors = sum(32 * (m + n) for m, n in LLAMA_2_7B)
        rows.append(
            {
                "exponent_bits": exponent,
                "bits": 8 * stored / weights,
                "as_published": 8 * stored / (weights + factors),
            }
        )
    return rows


def layers() -> dict[str, Any]:
    """Output errors of every layer under the same H, and what the two stages cost."""
    settings = make_settings(model="bundled", method="qera-exact", nsamples=32)
    skeleton = Skeleton(resolve_model("bundled"), torch.float32)
    tokens = calibration_tokens(settings, skeleton)
    seconds = dict.fromkeys(("profile", *RECIPES), 0.0)
    rows: dict[str, dict[str, float]] = {}
    started = time.process_time(), time.monotonic()
    quantizer = MXInt(4, 16)
    for block in collect(skeleton, tokens):
        seconds["profile"] += time.process_time() - started[0]
        hessians = block.hessians()
        for site in block.sites:
            problem = Problem(block.weight(site).float(), hessians[site.input_site], site.name)
            rows[site.name] = {}
            for name, recipe in RECIPES.items():
                begun = time.process_time()
                fit = fit_layer(
                    problem, recipe(quantizer, RANK), seed=0, layer=site.name, site=site.input_site
                )
                seconds[name] += time.process_time() - begun
                rows[site.name][name] = fit.relative_loss
        started = time.process_time(), started[1]
    exceptions = {
        name: r
        for name, r in rows.items()
        if not r["qera-exact"] <= r["qera-approx"] <= r["lqer"] <= r["no-lqer"]
    }
    least = sum(r["qera-exact"] <= min(r.values()) for r in rows.values())
    return {
        "rank": RANK,
        "format": "mxint4/16",
        "layers": rows,
        "exact_is_least": least,
        "exceptions": exceptions,
        "mean": {name: sum(r[name] for r in rows.values()) / len(rows) for name in RECIPES},
        "cpu_seconds": seconds,
        "wall_seconds_of_all": time.monotonic() - started[1],
        "load": os.getloadavg()[0],
    }


def root(sizes: list[int], most: int, rank: int = 32) -> list[dict[str, Any]]:
    """Both routes on the same error and H, the published one up to n = most; losses must agree."""
    rows = []
    for n in sizes:
        generator = torch.Generator().manual_seed(0)
        E = 1e-3 * torch.randn(n, n, generator=generator)
        X = torch.randn(2 * n, n, generator=generator, dtype=torch.float64)
        X *= torch.arange(1, n + 1).double() ** -0.5
        H = X.T @ X / len(X)
        begun = time.process_time()
        left, right = fit_low_rank(E, H, rank)
        ours = time.process_time() - begun
        row: dict[str, Any] = {"n": n, "rank": rank, "ours": ours}
        if n <= most:
            C, seconds = published_route(E, H, rank)
            loss = [_loss(E.double() - other, H) for other in ((left @ right).double(), C)]
            row |= {**seconds, "loss": loss[0], "published_loss": loss[1]}
        rows.append(row)
        print(row, flush=True)
    return rows


def published_route(
    E: torch.Tensor, H: torch.Tensor, rank: int
) -> tuple[torch.Tensor, dict[str, float]]:
    """C = (S^-1 SVD_k(S E^T))^T with S = sqrtm(H), in float64, timed by step."""
    import scipy.linalg

    begun = time.process_time()
    S = torch.from_numpy(scipy.linalg.sqrtm(H.numpy()).real)
    rooted = time.process_time()
    U, values, Vh = torch.linalg.svd(S @ E.double().T)
    A = torch.linalg.solve(S, U[:, :rank])
    C = (A @ torch.diag(values[:rank]) @ Vh[:rank]).T
    done = time.process_time()
    return C, {"published_root": rooted - begun, "published_svd": done - rooted}


def _loss(E: torch.Tensor, H: torch.Tensor) -> float:
    return float((E @ H * E).sum())


def quality(models: list[str], precisions: list[str], max_tokens: int) -> list[dict[str, Any]]:
    """Every method, reloaded from disk, evaluated beside the original in one run per precision."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for model in models:
            for precision in precisions:
                width, activation = map(int, precision[1:].split("A"))
                outs = [_compressed(model, method, width, activation, folder) for method in RECIPES]
                found = evaluate_models(
                    [model, *(str(out) for out, _ in outs)], "bundled:test", max_tokens=max_tokens
                ).to_dict()["models"]
                for method, (_, summary), score in zip(RECIPES, outs, found[1:], strict=True):
                    rows.append(
                        {
                            "model": Path(model).name,
                            "method": method,
                            "precision": summary.precision,
                            "bits": summary.bits_per_compressed_weight,
                            "perplexity": score["perplexity"],
                            "original_perplexity": found[0]["perplexity"],
                            "kl": score["kl"],
                            "kl_stderr": score["kl_stderr"],
                            "tokens": score["tokens"],
                        }
                    )
                    print(rows[-1], flush=True)
    return rows


def _compressed(
    model: str, method: str, width: int, activation: int, folder: Path
) -> tuple[Path, Any]:
    options: dict[str, Any] = {"format": f"mxint{width}/16"}
    if method != "no-lqer":
        options |= {"rank": RANK, "factor_format": "mxint8/16"}
    if activation < 16:
        options["activations"] = f"mxint{activation}/16"
    settings = make_settings(model=model, method=method, nsamples=32, **options)
    out = folder / f"{Path(model).name}-{method}-{width}-{activation}"
    statistics = folder / f"statistics-{Path(model).name}"
    seen = method not in ("no-lqer", "lqer")
    return out, compress_to(settings, out, hessians=statistics if seen else None)


def markdown(record: dict[str, Any]) -> str:
    """The figures as text tables."""
    parts = ["# The LQER family", ""]
    if "formats" in record:
        rows = [
            (r["format"], f"{r['mse']:.6f}", f"{r['bits']:.4f}", f"{r['over_shannon']:.3f}")
            for r in record["formats"]
        ]
        heads = ("format", "error on N(0,1)", "stored bits", "over Shannon")
        parts += ["## Formats", "", *_fenced(heads, rows)]
    if "bits" in record:
        rows = [
            (f"{r['exponent_bits']}-bit exponents", f"{r['bits']:.3f}", f"{r['as_published']:.3f}")
            for r in record["bits"]
        ]
        heads = ("W4, block 16, rank 32 at 8 bits", "per original weight", "as published")
        parts += ["## Average bits of Llama-2-7B's layers", "", *_fenced(heads, rows)]
    if "layers" in record:
        parts += _layer_lines(record["layers"])
    if "root" in record:
        parts += _root_lines(record["root"])
    if "quality" in record:
        rows = [
            (
                r["model"], r["method"], r["precision"], f"{r['bits']:.3f}", str(r["tokens"]),
                f"{r['original_perplexity']:.3f}", f"{r['perplexity']:.3f}",
                f"{r['kl']:.5f} ± {r['kl_stderr']:.5f}",
            )
            for r in record["quality"]
        ]  # fmt: skip
        heads = ("model", "method", "precision", "bits", "tokens", "original", "perplexity", "KL")
        text = (
            f"MXINT in blocks of 16, rank {RANK}, factors MXINT8; so many tokens of "
            "bundled:test; compare rows of equal tokens, beside the original's perplexity there."
        )
        parts += ["## Quality", "", text, "", *_fenced(heads, rows)]
    return "\n".join(parts).rstrip() + "\n"


def _layer_lines(found: dict[str, Any]) -> list[str]:
    rows = [
        (name, f"{found['mean'][name]:.6f}", f"{found['cpu_seconds'][name]:.1f}")
        for name in RECIPES
    ]
    count = len(found["layers"])
    odd = "; ".join(
        f"{name}: approx {r['qera-approx']:.5f}, SVD {r['lqer']:.5f}"
        for name, r in found["exceptions"].items()
    )
    text = (
        f"Bundled model, {found['format']}, rank {found['rank']}, factors MXINT8; relative output "
        f"error under the same H, mean of {count} layers. Exact is the least in "
        f"{found['exact_is_least']} of {count}, exact <= approx <= SVD <= none in "
        f"{count - len(found['exceptions'])}"
        + (f" (but for {odd}; only the first inequality is a theorem)" if odd else "")
        + ". Profile (32 windows of 512 tokens): "
        f"{found['cpu_seconds']['profile']:.1f} CPU seconds on one thread."
    )
    heads = ("method", "relative loss", "approximate, CPU s")
    return ["## Layers", "", text, "", *_fenced(heads, rows)]


def _root_lines(found: list[dict[str, Any]]) -> list[str]:
    rows = []
    for row in found:
        both = [row.get("published_root"), row.get("published_svd")]
        shown = ["-" if t is None else f"{t:.1f}" for t in both]
        ratio = "-" if both[0] is None else f"{(both[0] + both[1]) / row['ours']:.0f}"
        rows.append((str(row["n"]), f"{row['ours']:.2f}", *shown, ratio))
    heads = ("n", "here", "published: root", "SVD and solve", "ratio")
    measured = [row for row in found if "published_root" in row]
    lines = ["## The exact route, CPU seconds on one thread", "", *_fenced(heads, rows)]
    if measured and max(row["n"] for row in found) > measured[-1]["n"]:
        last = measured[-1]
        factor = (found[-1]["n"] / last["n"]) ** 3
        total = factor * (last["published_root"] + last["published_svd"])
        lines += [
            f"The published route at {found[-1]['n']} is not measured; n^3 from {last['n']} gives "
            f"about {total:.0f} s.",
            "",
        ]
    return lines


def _fenced(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    return ["```", plain_table(heads, rows), "```", ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = ("formats", "bits", "layers", "root", "quality")
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--sizes", nargs="+", type=int, default=[1024, 2048, 4096])
    parser.add_argument("--most", type=int, default=4096, help="published route up to this n")
    parser.add_argument("--models", nargs="+", default=["bundled"])
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--max-tokens", type=int, default=8_000)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/lqer.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    record = json.loads(args.out.read_text()) if args.out.is_file() else {}
    work: dict[str, Callable[[], Any]] = {
        "formats": formats,
        "bits": bits,
        "layers": layers,
        "root": lambda: root(args.sizes, args.most),
        "quality": lambda: quality(args.models, args.precisions, args.max_tokens),
    }
    for part in args.parts:
        record[part] = work[part]()
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        args.out.with_suffix(".md").write_text(markdown(record), encoding="utf-8")
    print(markdown(record))


if __name__ == "__main__":
    main()
