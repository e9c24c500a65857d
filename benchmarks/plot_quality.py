"""Draw KL against stored bits from benchmarks/results/quality.json: the README's picture.

python benchmarks/plot_quality.py [--results benchmarks/results/quality.json]
                                  [--out docs/images/quality.png]
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Above it every method is within the noise of the original.
MOST_BITS = 4.0
# Okabe-Ito colours and distinct markers: legible without colour and in print.
STYLE = {
    "rtn": ("#999999", "s"),
    "nf4": ("#CC79A7", "D"),
    "gptq": ("#E69F00", "^"),
    "quip-sharp": ("#56B4E9", "v"),
    "caldera": ("#0072B2", "o"),
    "qtip": ("#009E73", "P"),
    "convex-caldera": ("#D55E00", "*"),
}


def curves(rows: list[dict]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """model -> method -> [(bits, KL)]."""
    found: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["method"] in STYLE and "kl" in row and row["budget_bits"] <= MOST_BITS:
            point = (row["bits_per_compressed_weight"], row["kl"])
            found[row["model"]][row["method"]].append(point)
    return found


def draw(models: dict, out: Path) -> None:
    fig, axes = plt.subplots(1, len(models), figsize=(4.4 * len(models), 3.8), squeeze=False)
    for axis, (model, methods) in zip(axes[0], models.items(), strict=True):
        for method, points in methods.items():
            color, marker = STYLE[method]
            bold = method == "convex-caldera"
            axis.plot(
                *zip(*sorted(points), strict=True),
                color=color,
                marker=marker,
                label=method,
                linewidth=2.4 if bold else 1.2,
                markersize=11 if bold else 6,
                zorder=3 if bold else 2,
            )
        axis.set_yscale("log")
        axis.set_title(model)
        axis.set_xlabel("stored bits per compressed weight")
        axis.grid(True, which="both", alpha=0.25)
    axes[0][0].set_ylabel("KL from the original, nats per token")
    named = {label: line for axis in axes[0]
             for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}  # fmt: skip
    shown = [method for method in STYLE if method in named]
    fig.legend([named[method] for method in shown], shown, loc="lower center", ncols=len(shown),
               fontsize=9, frameon=False)  # fmt: skip
    fig.tight_layout(rect=(0, 0.07, 1, 1))
    out.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(out, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--results", type=Path, default=Path("benchmarks/results/quality.json"), nargs="?"
    )
    parser.add_argument("--out", type=Path, default=Path("docs/images/quality.png"))
    args = parser.parse_args()
    draw(curves(json.loads(args.results.read_text())["rows"]), args.out)


if __name__ == "__main__":
    main()
