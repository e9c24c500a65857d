"""Rate and distortion of ReALLM's latents beside scalar, trellis and each other, on real matrices.

    python benchmarks/reallm.py [--out benchmarks/results/reallm.json] [--epochs 10]

Every code is fitted to matrices of the bundled model under H = I, without low rank and feedback,
so that only the codes differ. Bits are all stored bits of a matrix. An autoencoder's decoder is its
own ("ae"), and once more counted as if the whole model shared it ("ae shared": the same error, its
decoder spread over all weights).

    python benchmarks/reallm.py --patch-set [--epochs 10]

measures instead what training takes at the mission's own size: one matrix in patches of 512, five
strides of 2, embeddings of 16 channels, 7.2 million parameters.
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
from convex_caldera.quantizers.neural_patches import patches_of
from convex_caldera.quantizers.neural_training import train
from convex_caldera.recipes.autoencoder import core_of, parse_options, reallm_ae_recipe
from convex_caldera.recipes.reallm import reallm_vq_recipe
from convex_caldera.transforms.hadamard import RandomizedHadamard

MATRICES = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.3.self_attn.v_proj",
    "model.layers.5.self_attn.o_proj",
    "model.layers.2.mlp.up_proj",
)
PATCHED = "model.layers.2.mlp.up_proj"
MISSION = (
    "p_size=512", "conv_type=convnext,quantpshuffle", "enc_dim=64_16", "enc_strds=2,2,2,2,2",
    "dec_strds=2,2,2,2,2", "modelsize=7.2", "ks=0_1_5", "lower_width=12", "wbits=8",
)  # fmt: skip
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


def patch_set(epochs: int) -> dict:
    """Training of one set of 512 x 512 patches by the mission's parameters, alone."""
    W = Checkpoint(resolve_model("bundled")).tensor(f"{PATCHED}.weight").float()
    neural = parse_options((*MISSION, f"epochs={epochs}")).neural((W.shape[0], W.shape[1]), 6)
    patches = patches_of(W / W.abs().max(), neural.patch, torch.ones(W.shape[1]))
    errors: list[float] = []
    started, cpu = time.monotonic(), time.process_time()

    def told(epoch: int, of: int, error: float) -> None:
        errors.append(error)
        print(
            f"epoch {epoch}/{of}, error {error:.4f}, {time.monotonic() - started:.0f} s", flush=True
        )

    train(patches, neural.geometry, neural.training, told)
    return {
        "matrix": PATCHED, "shape": list(W.shape), "patches": len(patches), "side": neural.patch,
        "decoder_weights": neural.geometry.weights, "epochs": epochs, "batch_errors": errors,
        "seconds": time.monotonic() - started, "cpu_seconds": time.process_time() - cpu,
    }  # fmt: skip


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
    parser.add_argument("--patch-set", action="store_true", help="only the training of 512 x 512")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.patch_set:
        write(args.out, {"patch_set": patch_set(args.epochs)})
        return
    rows: list[dict] = []
    for name in args.matrices:
        rows += measure(name, args.epochs)
        matrices = sorted({row["matrix"] for row in rows})
        write(args.out, {"epochs": args.epochs, "matrices": matrices, "rows": rows})
    print(table(rows))


def write(out: Path, parts: dict) -> None:
    """The JSON record, other parts kept, and its tables beside it."""
    record = json.loads(out.read_text()) if out.exists() else {"rows": [], "matrices": []}
    record |= {"version": convex_caldera.__version__, "python": platform.python_version(), **parts}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")
    names = ", ".join(record["matrices"])
    head = (
        f"Means over {names} of the bundled model, H = I, no low rank, no feedback; all stored "
        'bits counted. "shared": the decoder spread over the whole model.\n\n'
    )
    tail = sentence(record["patch_set"]) if "patch_set" in record else ""
    out.with_suffix(".md").write_text(head + table(record["rows"]) + tail)


def sentence(found: dict) -> str:
    """What training of one set of large patches took."""
    each = found["cpu_seconds"] / found["epochs"] / found["patches"]
    return (
        f"\nTraining on {found['side']} x {found['side']} patches by the mission's parameters "
        f"({found['matrix']}, {found['patches']} patches, {found['decoder_weights']:,} decoder "
        f"weights, one thread): {found['cpu_seconds']:.0f} CPU s for {found['epochs']} epochs, "
        f"{each:.0f} a patch and epoch. It says nothing of rates: the matrix is small beside such "
        "a decoder.\n"
    )


if __name__ == "__main__":
    main()
