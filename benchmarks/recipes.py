"""Ready-to-run recipes for Llama models, with disk and memory from `plan` and a guess of the time.

    python benchmarks/recipes.py

`plan` reads shapes only. So each model is stood in for by its configuration and sparse shards with
the right headers, which hold no weight and take no disk; a shard is small enough to be mapped on
any machine. Writes results/recipes.json.

Seconds are scaled from one 4096 x 4096 matrix through CALDERA on two CPU threads
(results/layer.json) by m n (m + n) / 2, the order of its products and factorizations, and for other
methods by their seconds beside CALDERA's on the small models (results/quality.json); calibration
comes on top. They say an order of magnitude, for that machine.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

from convex_caldera.recipes.lattice import CALDERA_SWEEPS, REFINEMENT_SWEEPS
from convex_caldera.workflow.estimate import estimate
from convex_caldera.workflow.settings import make_settings

RESULTS = Path(__file__).parent / "results"
# hidden, MLP, layers, heads, key-value heads, vocabulary, positions
SHAPES = {
    "meta-llama/Llama-2-7b-hf": (4096, 11008, 32, 32, 32, 32000, 4096),
    "meta-llama/Llama-2-13b-hf": (5120, 13824, 40, 40, 40, 32000, 4096),
    "meta-llama/Meta-Llama-3-8B": (4096, 14336, 32, 32, 8, 128256, 8192),
    "meta-llama/Llama-2-70b-hf": (8192, 28672, 80, 64, 8, 32000, 4096),
}
RECIPES = (
    ("caldera", 2.2, "input"),
    ("quip-sharp", 2.2, "input"),
    ("convex-caldera", 2.2, "input"),
    ("convex-caldera", 3.2, "input"),
)
NSAMPLES, SEQLEN = 256, 2048
SHARD_BYTES = 2_000_000_000


def main() -> None:
    layer = json.loads((RESULTS / "layer.json").read_text())
    cells = json.loads((RESULTS / "quality.json").read_text())["rows"]
    rows: list[dict[str, Any]] = []
    record = {
        "command": "python benchmarks/recipes.py",
        "nsamples": NSAMPLES,
        "seqlen": SEQLEN,
        "layer": {key: layer[key] for key in ("size", "threads", "machine")},
        "rows": rows,
    }
    with tempfile.TemporaryDirectory() as folder:
        stand_ins = {
            name: write_stand_in(Path(folder) / name.rpartition("/")[2], *shape)
            for name, shape in SHAPES.items()
        }
        for recipe in RECIPES:
            for name, stand_in in stand_ins.items():
                started = time.monotonic()
                found = row(name, stand_in, layer, *recipe)
                found["fit_hours"] *= beside_caldera(cells, recipe[0])
                rows.append(found)
                (RESULTS / "recipes.json").write_text(json.dumps(record, indent=1) + "\n")
                print(name, *recipe, f"{time.monotonic() - started:.1f} s", flush=True)


def caldera_seconds(layer: dict[str, Any]) -> float:
    """Of the timed matrix with the sweeps of the recipe, which scale its phases."""
    seconds = dict(layer["seconds"])
    once = seconds["_enter"] + seconds["block_unit_upper"]
    refine = seconds["refine"] * REFINEMENT_SWEEPS / layer["refinement"]
    sweep = seconds["total"] - once - seconds["refine"] + refine
    return once + sweep * CALDERA_SWEEPS / layer["sweeps"]


def beside_caldera(cells: list[dict[str, Any]], method: str) -> float:
    """Seconds of a method over those of CALDERA, summed over the cells that both have."""
    seconds = {
        name: {
            (c["model"], c["budget_bits"]): c["seconds"]
            for c in cells
            if c["method"] == name and "seconds" in c
        }
        for name in (method, "caldera")
    }
    both = [
        c
        for c in set(seconds[method]) & set(seconds["caldera"])
        if seconds[method][c] and seconds["caldera"][c]
    ]
    return sum(seconds[method][c] for c in both) / sum(seconds["caldera"][c] for c in both)


def row(
    name: str, stand_in: Path, layer: dict[str, Any], method: str, bits: float, curvature: str
) -> dict[str, Any]:
    settings = make_settings(
        model=str(stand_in), method=method, bits=bits, curvature=curvature, nsamples=NSAMPLES,
        seqlen=SEQLEN, dtype="bfloat16",
    )  # fmt: skip
    plan = estimate(settings).to_dict()
    products = sum(m * n * (m + n) / 2 for m, n in (r["shape"] for r in plan["layers"]))
    short = name.rpartition("/")[2]
    return {
        "model": name,
        "method": method,
        "command": f"convex-caldera compress {name} -o {short}-{method}-{bits} --method {method} "
        f"--bits {bits} --curvature {curvature} --dataset allenai/c4@en:validation "
        f"--nsamples {NSAMPLES} --seqlen {SEQLEN} --dtype bfloat16",
        "file_bytes": plan["file_bytes"],
        "original_bytes": plan["original_bytes"],
        "bits_per_compressed_weight": plan["bits_per_compressed_weight"],
        "bits_per_weight": plan["bits_per_weight"],
        "peak_memory_bytes": plan["peak_memory_bytes"],
        "fit_hours": caldera_seconds(layer) * products / layer["size"] ** 3 / 3600,
    }


def write_stand_in(
    folder: Path,
    hidden: int,
    mlp: int,
    layers: int,
    heads: int,
    kv: int,
    vocabulary: int,
    longest: int,
) -> Path:
    """config.json and sparse shards of float16 tensors."""
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": mlp, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv, "vocab_size": vocabulary, "max_position_embeddings": longest,
        "tie_word_embeddings": False, "torch_dtype": "float16", "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    narrow = hidden // heads * kv
    block = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (narrow, hidden),
        "self_attn.v_proj": (narrow, hidden), "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (mlp, hidden), "mlp.up_proj": (mlp, hidden),
        "mlp.down_proj": (hidden, mlp), "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }  # fmt: skip
    shapes = {"model.embed_tokens": (vocabulary, hidden), "model.norm": (hidden,)}
    shapes |= {"lm_head": (vocabulary, hidden)}
    shapes |= {f"model.layers.{i}.{k}": s for i in range(layers) for k, s in block.items()}
    weights = {f"{name}.weight": shape for name, shape in shapes.items()}
    write_shards(folder, weights)
    return folder


def write_shards(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Sparse float16 shards of at most SHARD_BYTES, or one tensor, and their index."""
    shards: list[dict[str, int]] = [{}]
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        if shards[-1] and sum(shards[-1].values()) + size > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = size
    files = {}
    for number, sizes in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        files |= dict.fromkeys(sizes, file)
        header, end = {}, 0
        for name, size in sizes.items():
            header[name] = {
                "dtype": "F16", "shape": list(shapes[name]), "data_offsets": [end, end + size]
            }  # fmt: skip
            end += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / file, "wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + end)
    index = {"metadata": {"total_size": sum(map(sum, (s.values() for s in shards)))},
             "weight_map": files}  # fmt: skip
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


if __name__ == "__main__":
    main()
