"""Rate and distortion of ReALLM's latents beside scalar, trellis and each other, on real matrices.

    python benchmarks/reallm.py [--out benchmarks/results/reallm.json] [--epochs 10]

Every code is fitted to matrices of the bundled model under H = I, without low rank and feedback,
so that only the codes differ. Bits are all stored bits of a matrix. An autoencoder's decoder is its
own ("ae"), and once more counted as if the whole model shared it ("ae shared": the same error, its
decoder spread over all weights).
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from dataclasses import replace
from pathlib import Path

import torch

import convex_caldera
from convex_caldera.core.hessian import Hessian
from convex_caldera.core.problem import Problem
from convex_caldera.core.recipe import Quantize, Recipe
from convex_caldera.fit.backfit import fit_layer
from convex_caldera.models.checkpoint import Checkpoint
from convex_caldera.models.resolve import resolve_model
from convex_caldera.quantizers import Trellis, Uniform
from convex_caldera.recipes.autoencoder import core_of, parse_options, reallm_ae_recipe
from convex_caldera.recipes.reallm import reallm_vq_recipe
from convex_caldera.transforms.hadamard import RandomizedHadamard

MATRICES = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.3.self_attn.v_proj",
    "model.layers.5.self_attn.o_proj",
    "model.layers.2.mlp.up_proj",
)
MODEL_WEIGHTS = 5_474_304  # of all compressed layers of the bundled model
RATES = (2, 3, 4)


def codes(shape: tuple[int, int], epochs: int) -> dict[str, Recipe]:
    """Recipes by "name rate"."""
    options = parse_options((f"epochs={epochs}",))
    deep = parse_options(
        (f"epochs={epochs}", "enc_dim=32_16", "enc_strds=2,2", "dec_strds=2,2", "width=32")
    )
    found: dict[str, Recipe] = {}
    for bits in RATES:
        found[f"scalar {bits}"] = Recipe((Quantize(Uniform(bits, 64), "identity"),))
        found[f"nf {bits}"] = reallm_vq_recipe(bits, 0, latent="nf", metric="identity")
        for bucket in (1, 2):
            found[f"vq bucket {bucket} {bits}"] = reallm_vq_recipe(
                bits, 0, bucket, metric="identity"
            )
        found[f"trellis {bits}"] = Recipe(
            (Quantize(Trellis(bits, 12), "identity"),), transforms=(RandomizedHadamard(),)
        )
        found[f"ae {bits}"] = reallm_ae_recipe(options.neural(shape, bits))
        found[f"ae deep {bits}"] = reallm_ae_recipe(deep.neural(shape, bits))
        half = replace(options.neural(shape, min(2 * bits, 8)), channels=2)
        found[f"ae half {bits}"] = reallm_ae_recipe(half)
    found["vq bucket 4 2"] = reallm_vq_recipe(2, 0, 4, metric="identity")
    found["vq strips 2"] = reallm_vq_recipe(2, 0, 2, order="strip", metric="identity")
    return found


def measure(name: str, epochs: int) -> list[dict]:
    """One row per code for a matrix."""
    W = Checkpoint(resolve_model("bundled")).tensor(f"{name}.weight").float()
    problem = Problem(W, Hessian.identity(W.shape[1]), name)
    rows = []
    for label, recipe in codes((W.shape[0], W.shape[1]), epochs).items():
        started = time.process_time()
        fit = fit_layer(problem, recipe, seed=0, layer=name, site=name)
        bits = 8 * fit.layer.stored_bytes() / W.numel()
        row = {
            "matrix": name, "shape": list(W.shape), "code": label.rpartition(" ")[0],
            "rate": int(label.rpartition(" ")[2]), "bits": bits, "error": fit.relative_loss,
            "shannon": 4.0**-bits, "cpu_seconds": time.process_time() - started,
        }  # fmt: skip
        rows.append(row)
        if label.startswith("ae"):
            core = core_of(recipe)
            decoder = sum(
                8 * dtype.itemsize * size[0]
                for dtype, size in core.geometry.layout(core.decoder_bits).values()
            )
            spread = bits - decoder / W.numel() + decoder / MODEL_WEIGHTS
            rows.append({**row, "code": row["code"] + " shared", "bits": spread,
                         "shannon": 4.0**-spread})  # fmt: skip
        print(json.dumps(row), flush=True)
    return rows


def table(rows: list[dict]) -> str:
    """Means over the matrices, by code and rate."""
    lines = [
        "| code | rate | stored bits | relative error | times 4^-bits | CPU s |",
        "|---|---|---|---|---|---|",
    ]
    keys = sorted({(r["rate"], r["code"]) for r in rows})
    means = []
    for rate, code in keys:
        these = [r for r in rows if (r["rate"], r["code"]) == (rate, code)]
        mean = {k: sum(r[k] for r in these) / len(these) for k in ("bits", "error", "cpu_seconds")}
        means.append((rate, mean["error"] * 4 ** mean["bits"], code, mean))
    for rate, ratio, code, mean in sorted(means, key=lambda m: m[:2]):
        lines.append(
            f"| {code} | {rate} | {mean['bits']:.3f} | {mean['error']:.5f} | {ratio:.2f} "
            f"| {mean['cpu_seconds']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/reallm.json"))
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--matrices", nargs="+", default=list(MATRICES))
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict] = []
    for name in args.matrices:
        rows += measure(name, args.epochs)
        write(args.out, rows, args.epochs)
    print(table(rows))


def write(out: Path, rows: list[dict], epochs: int) -> None:
    """The JSON record, and its table beside it."""
    record = {
        "version": convex_caldera.__version__,
        "python": platform.python_version(),
        "epochs": epochs,
        "matrices": sorted({row["matrix"] for row in rows}),
        "rows": rows,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")
    names = ", ".join(record["matrices"])
    head = (
        f"Means over {names} of the bundled model, H = I, no low rank, no feedback; all stored "
        'bits counted. "shared": the decoder spread over the whole model.\n\n'
    )
    out.with_suffix(".md").write_text(head + table(rows))


if __name__ == "__main__":
    main()
