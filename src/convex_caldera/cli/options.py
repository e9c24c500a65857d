"""Options that several commands share, described once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

Model = Annotated[
    str, typer.Argument(help="A local Hugging Face directory, a hub id, or `bundled`.")
]
Json = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Also write the figures as JSON.")
]
Bits = Annotated[
    float | None,
    typer.Option("--bits", help="Stored bits per compressed weight, never exceeded. Default 4."),
]
Size = Annotated[
    str | None, typer.Option("--size", help="Bytes of all weight files, such as 1.5GB or 700MiB.")
]
Ratio = Annotated[
    str | None, typer.Option("--ratio", help="How many times smaller the weight files, such as 6x.")
]
Method = Annotated[str | None, typer.Option("--method", "-m", help="See `convex-caldera methods`.")]
Rank = Annotated[
    int | None, typer.Option("--rank", help="Rank of the low-rank term (methods that have one).")
]
FactorBits = Annotated[
    int | None, typer.Option("--factor-bits", help="Bits of its factors: 2, 3, 4 or 16.")
]
GroupSize = Annotated[
    int | None, typer.Option("--group-size", help="Weights that share a scale; 0: a row, -1: all.")
]
Format = Annotated[
    str | None,
    typer.Option("--format", help="Of the codes: mxint, mxint4/16, int4/128, nf4, e2m1, ..."),
]
FactorFormat = Annotated[
    str | None,
    typer.Option("--factor-format", help="Of the factors: mxint8/32, int8, ..., float16."),
]
Activations = Annotated[
    str | None,
    typer.Option(
        "--activations",
        help="Round linear inputs and attention products as well: mxint8/16, or "
        '"mxint8/16,attention:none". Kept unless given.',
    ),
]
Bucket = Annotated[
    int | None, typer.Option("--bucket", help="Weights of a coded vector: 1, 2, 4 or 8 (ReALLM).")
]
Latent = Annotated[
    str | None, typer.Option("--latent", help="Latent codes: vq (a codebook) or nf (NormalFloat).")
]
Order = Annotated[
    str | None,
    typer.Option("--order", help="Of columns: none, or strip (of its own for every 64 rows)."),
]
Neural = Annotated[
    list[str] | None,
    typer.Option("--neural", help="Option name=value of an autoencoder. May be repeated."),
]
CodeBits = Annotated[
    int | None,
    typer.Option("--code-bits", help="Bits of one code, of a weight or block; instead of --bits."),
]
BlockSize = Annotated[
    int | None,
    typer.Option("--block-size", "--block_size", help="Weights of a coded block: 1, 2, 4 or 8."),
]
NumIters = Annotated[
    int | None,
    typer.Option("--num-iters", "--num_iters", help="Iterations of fitting a codebook."),
]
SampleSize = Annotated[
    int | None,
    typer.Option("--sample-size", "--sample_size", help="Weights or blocks that it is fitted to."),
]
ClipRatio = Annotated[
    float | None,
    typer.Option("--clip-ratio", "--clip_ratio", help="Part of the weights inside the range."),
]
Lossless = Annotated[
    bool | None,
    typer.Option("--lossless", help="Code the exponents of what stays in 16 bits, bit-exactly."),
]
Embeddings = Annotated[
    bool | None,
    typer.Option(
        "--embeddings",
        help="Compress the input embedding and the output head too, as one matrix where tied.",
    ),
]
Coder = Annotated[
    str | None,
    typer.Option(
        "--coder",
        help="Entropy coding of the codes: huffman or rans. Bytes saved are spent on finer codes.",
    ),
]
Dataset = Annotated[
    str | None,
    typer.Option(
        "--dataset",
        help="Calibration text: a .txt or .jsonl file, bundled[:split], or a hub data set. "
        "Default bundled:calibration.",
    ),
]
NSamples = Annotated[
    int | None, typer.Option("--nsamples", help="Calibration windows. Default 128.")
]
SeqLen = Annotated[int | None, typer.Option("--seqlen", help="Tokens per window. Default 512.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Of every random choice. Default 42.")]
Device = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, cuda:0, mps. Default cpu.")
]
DType = Annotated[
    str | None,
    typer.Option("--dtype", help="Of the calibration pass: auto, float32, float16, bfloat16."),
]
Ignore = Annotated[
    list[str] | None,
    typer.Option("--ignore", help="Layers to leave as they are: part of a name, glob, or re:..."),
]
Pin = Annotated[
    list[str] | None,
    typer.Option("--pin", help='Fix layers: "pattern=bits:4,rank:0". May be repeated.'),
]
Curvature = Annotated[
    str | None,
    typer.Option(
        "--curvature",
        help="What rounding sees: none, input (second moments), kronecker (both sides of the "
        "model's loss) or guided (its input side, by groups of output channels).",
    ),
]
CurvatureFallback = Annotated[
    str | None,
    typer.Option(
        "--curvature-fallback",
        help="For layers whose gradients vanish: none (an error, the default) or input.",
    ),
]
Shrinkage = Annotated[
    str | None,
    typer.Option(
        "--shrinkage",
        help="Smooth curvature from gradients: auto (the method's own), none, held-out (searched), "
        "or shares of the input and the output side such as 0.05,0.2.",
    ),
]
Targets = Annotated[
    str | None,
    typer.Option(
        "--targets",
        help="What is rounded: auto (the method's own), original weights, or drift-corrected ones, "
        "block after block.",
    ),
]
Draws = Annotated[
    int | None,
    typer.Option(
        "--draws", min=1, help="Of labels for each window that curvature is measured on; default 1."
    ),
]
Remeasure = Annotated[
    bool | None,
    typer.Option(
        "--remeasure",
        help="Measure curvature once more on the compressed model, fit again, and keep what costs "
        "less on calibration windows held out.",
    ),
]
Modules = Annotated[
    str | None,
    typer.Option(
        "--modules", help="Parts to compress: language, tower, projector. Default language."
    ),
]
Images = Annotated[
    str | None,
    typer.Option("--images", help="Folder of images that tower and projector are calibrated on."),
]
DiagHessians = Annotated[
    str | None,
    typer.Option(
        "--diag-hessians",
        help="Diagonal Hessians of a file (diag_Hessians.pt) instead of calibration.",
    ),
]
Tie = Annotated[
    list[str] | None,
    typer.Option("--tie", help='Kinds that share a format in each block: "q_proj,k_proj,v_proj".'),
]
BitsMenu = Annotated[
    str | None,
    typer.Option("--bits-menu", help="Rates that allocation may choose, such as 1.5,2,2.5,3,4."),
]
RankMenu = Annotated[
    str | None, typer.Option("--rank-menu", help="Ranks that it may choose, such as 0,8,16.")
]
AllowShort = Annotated[
    bool | None, typer.Option("--allow-short", help="Accept a calibration text that is too short.")
]
Config = Annotated[
    Path | None, typer.Option("--config", metavar="TOML", help="Settings or a written recipe.toml.")
]


def write_json(path: Path | None, record: dict[str, Any]) -> None:
    """The machine-readable twin of what was printed."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def given(**options: Any) -> dict[str, Any]:
    """Only the options that the user gave, lists as tuples."""
    present = {k: v for k, v in options.items() if v is not None and v != []}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in present.items()}
