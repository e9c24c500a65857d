"""Distortion against rate on N(0, 1), every quantizer of the library: docs/images/distortion.png.

    python benchmarks/plot_distortion.py [--size 262144] [--seed 0]
        [--results benchmarks/results/distortion.json] [--out docs/images/distortion.png]

Trellis codes are read from benchmarks/results/trellis_distortion.json, which takes minutes to
make; the others are measured here, per row or group as a weight matrix would be, entropy-coded
quantizers at the empirical entropy of their codes. Bits count every scale and codebook; so few
rows make codebooks look dear, as they are in a small layer.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from convex_caldera.core.protocols import Quantizer
from convex_caldera.core.seeds import generator
from convex_caldera.quantizers import (
    E8P,
    ECSQ,
    ECVQ,
    ClippedUniform,
    KMeans,
    LloydMax,
    Minifloat,
    MXInt,
    NormalFloat,
    Uniform,
)

TRELLIS = Path("benchmarks/results/trellis_distortion.json")
# label -> quantizers in order of rate
FAMILIES: dict[str, list[Quantizer]] = {
    "uniform, groups of 128": [Uniform(b, 128) for b in (2, 3, 4, 5, 6)],
    "clipped uniform": [ClippedUniform(b, 0) for b in (2, 3, 4, 5, 6)],
    "MXINT, blocks of 16": [MXInt(b) for b in (2, 3, 4, 6)],
    "minifloat": [Minifloat(b) for b in (4, 6, 8)],
    "NormalFloat, blocks of 64": [NormalFloat(b, 64) for b in (2, 3, 4)],
    "Lloyd-Max": [LloydMax(b, 0) for b in (1, 2, 3, 4, 5)],
    "k-means, vectors of 4": [KMeans(b, dim=4) for b in (1.0, 1.5, 2.0)],
    "ECSQ, entropy-coded": [ECSQ(b) for b in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)],
    "ECVQ, entropy-coded": [ECVQ(b, 2) for b in (1.0, 1.5, 2.0, 2.5)],
    "E8P": [E8P(b) for b in (2, 3, 4)],
}
TRELLIS_FAMILIES = {
    "trellis, L = 12": "weyl-12-",
    "trellis, trained table of 2^12": "table-12-",
    "trellis, L = 16": "weyl-16-",
    "trellis, beam of 16384": "beam-weyl-24-16384-",
}
MARKERS = "sDv^<>pPhX*oHd"


def entropy_bits(codes: torch.Tensor) -> float:
    """Empirical entropy of a code, bits."""
    counts = torch.unique(codes, return_counts=True)[1].double()
    shares = counts / counts.sum()
    return float(-(shares * shares.log2()).sum())


def measure(quantizer: Quantizer, size: int, seed: int) -> dict[str, float]:
    W = torch.randn((size // 1024, 1024), generator=generator(seed, "gaussian", "distortion"))
    fitted = quantizer.fit(W)
    codes = fitted.encode(W)
    mse = (fitted.decode(codes) - W).double().square().mean().item()
    side = 8 * sum(t.numel() * t.element_size() for t in fitted.tensors().values()) / W.numel()
    if isinstance(quantizer, (ECSQ, ECVQ)):
        bits = entropy_bits(codes) * codes.numel() / W.numel() + side
    else:
        bits = 8 * fitted.pack(codes).numel() / W.numel() + side
    return {"stored_bits": bits, "mse": mse, "ratio": mse * 4.0**bits}


def collect(size: int, seed: int) -> dict[str, list[dict[str, float]]]:
    """label -> points, in order of rate."""
    found = {
        label: [measure(quantizer, size, seed) for quantizer in family]
        for label, family in FAMILIES.items()
    }
    rows = json.loads(TRELLIS.read_text())["rows"]
    keys = ("stored_bits", "mse", "ratio")
    for label, start in TRELLIS_FAMILIES.items():
        points = [{k: row[k] for k in keys} for name, row in rows.items() if name.startswith(start)]
        found[label] = sorted(points, key=lambda point: point["stored_bits"])
    return found


def draw(families: dict[str, list[dict[str, float]]], out: Path) -> None:
    """Left: error against rate beside Shannon's bound. Right: their ratio."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 6))
    colors = plt.get_cmap("viridis")
    for i, ((label, points), marker) in enumerate(zip(families.items(), MARKERS, strict=False)):
        bits = [point["stored_bits"] for point in points]
        ours = label.startswith("trellis")
        style = {
            "color": "#D55E00" if ours else colors(0.9 * i / len(families)),
            "marker": marker,
            "linewidth": 1.8 if ours else 1.0,
            "markersize": 5,
            "label": label,
        }
        left.plot(bits, [point["mse"] for point in points], **style)
        right.plot(bits, [point["ratio"] for point in points], **style)
    rates = [0.8, 6.5]
    left.plot(rates, [4.0**-rate for rate in rates], "k-", linewidth=1.2, label="Shannon, 2^(-2R)")
    right.axhline(1.0, color="black", linewidth=1.2)
    left.set(yscale="log", xlabel="stored bits per weight", ylabel="mean squared error, N(0, 1)")
    right.set(yscale="log", ylim=(0.97, 7.5), xlim=(0.8, 6.5))
    right.set(xlabel="stored bits per weight", ylabel="times Shannon's limit")
    ticks = (1.0, 1.1, 1.2, 1.5, 2.0, 3.0, 5.0)
    right.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    right.minorticks_off()
    left.set(xlim=(0.8, 6.5), ylim=(2e-4, 0.5))
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), fontsize=9, ncol=5, loc="lower center")
    figure.tight_layout(rect=(0, 0.11, 1, 1))
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)


def table(families: dict[str, list[dict[str, float]]]) -> str:
    lines = ["| quantizer | stored bits | mse | times Shannon's limit |", "|---|---|---|---|"]
    for label, points in families.items():
        for p in points:
            lines.append(
                f"| {label} | {p['stored_bits']:.3f} | {p['mse']:.5f} | {p['ratio']:.3f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=1 << 18)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/distortion.json"))
    parser.add_argument("--out", type=Path, default=Path("docs/images/distortion.png"))
    args = parser.parse_args()
    families = collect(args.size, args.seed)
    args.results.write_text(json.dumps({"size": args.size, "families": families}, indent=1) + "\n")
    args.results.with_suffix(".md").write_text(table(families))
    draw(families, args.out)


if __name__ == "__main__":
    main()
