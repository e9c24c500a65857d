"""How well convex-caldera's predicted loss is met, in total and layer by layer.

    python benchmarks/prediction.py [--data DIR] [--models bundled ...] [--bits 2 2.2 2.5 3 4]
                                    [--work DIR] [--window 512] [--max-tokens 8192]
                                    [--calibration FILE] [--text FILE]
                                    [--out benchmarks/results/prediction.json]

Two predictions of the whole: the plan's, which is the sum of what its layers cost alone times the
share of it that drift correction leaves, and the KL on calibration windows held out, which a
compression states when it ends. Both are set beside the KL on text that no calibration has seen. A
layer's prediction is its own stored loss times its held-out scale; it is set beside the KL of the
original model with this one layer exchanged. Windows longer than those of the calibration ask for
positions that no prediction has seen; rows of several --window stand side by side. Outputs are
those of benchmarks/quality.py under --work, made there if they are missing. Writes JSON, a table,
and docs/images/prediction.png.

A text ending in _first.txt or _rest.txt in the table is the text of that name cut at the first end
of a line after three fifths of its characters, so that no calibration has seen the rest.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from quality import CASES, located, output, run_cell

from convex_caldera.calibrate.text import read_text
from convex_caldera.models.original import load_original
from convex_caldera.models.resolve import resolve_model
from convex_caldera.models.tokenizer import load_tokenizer
from convex_caldera.report.plots.calibration import GOOD_RATIO, rank_correlation
from convex_caldera.runtime.load import load
from convex_caldera.storage.manifest import FOLDER
from convex_caldera.storage.read import open_container
from convex_caldera.workflow.held_out_kl import expected_kl
from convex_caldera.workflow.single_layers import kl_of_single_layers

METHOD = "convex-caldera"
# Okabe-Ito colours and markers, legible without colour.
LOOKS = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"),
         ("#56B4E9", "P"), ("#000000", "X"), ("#F0E442", "*"))  # fmt: skip


def run_cell_of(name: str, bits: float, args, folder: Path) -> dict:
    """Predictions of one output beside what is measured on held-out text."""
    texts = [
        own or usual for own, usual in zip((args.calibration, args.text), CASES[name], strict=True)
    ]
    calibration, evaluation = (located(text, args.data) for text in texts)
    out = output(folder, name, METHOD, bits)
    run_cell(located(name, args.data), METHOD, bits, calibration, out, args)
    container = open_container(out)
    certificate = json.loads((out / FOLDER / "certificate.json").read_text())
    path = resolve_model(located(name, args.data))
    found = kl_of_single_layers(
        load_original(path, torch.float32, "cpu"),
        {
            layer: (lambda layer=layer: container.layer(layer).decode())
            for layer in container.layers
        },
        load(out, dtype=torch.float32),
        read_text(evaluation),
        load_tokenizer(path),
        window=args.window,
        max_tokens=args.max_tokens,
    )
    predicted = {n: r["loss"] * r["held_out_scale"] for n, r in certificate["layers"].items()}
    measured = {layer: row["kl"] for layer, row in found["layers"].items()}
    return {
        "model": Path(name).name,
        "bits": bits,
        "texts": [Path(text).name for text in texts],
        "seqlen": args.seqlen,
        "window": args.window,
        "sum": certificate["plan"]["distortion"],
        "expected_kl": expected_kl(certificate["plan"]["distortion"], certificate["targets"]),
        "held_out_kl": container.report().get("held_out_kl"),
        "measured_kl": found["total_kl"],
        "measured_kl_stderr": found["total_kl_stderr"],
        "layers": {n: {"predicted": predicted[n], "measured": measured[n]} for n in measured},
    }


def summary(row: dict) -> dict[str, float]:
    """Ratios of measured to predicted, and how the layers are ranked."""
    pairs = [(v["predicted"], v["measured"]) for v in row["layers"].values()]
    x, y = (np.array(side) for side in zip(*pairs, strict=True))
    low, high = GOOD_RATIO
    held_out = row["held_out_kl"]["kl"] if row["held_out_kl"] else float("nan")
    return {
        "by_plan": row["measured_kl"] / row["expected_kl"],
        "by_held_out": row["measured_kl"] / held_out,
        "layers_in_band": float(np.mean((y / x >= low) & (y / x <= high))),
        "median_layer": statistics.median((y / x).tolist()),
        "rank_correlation": rank_correlation(x, y),
    }


def table(rows: list[dict]) -> str:
    lines = [
        "`python benchmarks/prediction.py --data DATA --work DIR`, --seqlen, --calibration, --text "
        "and --window as in the rows: measured over predicted KL, on text that "
        "no calibration has seen. Layers: share with a ratio from 0.7 to 1.4, median ratio, "
        "Spearman's rank correlation.",
        "",
        "| model | budget | calibrated on, windows | read, windows | measured KL | sum of layers "
        "| predicted by the plan | ratio | held-out windows | ratio | layers in band "
        "| median layer | rank correlation |",
        "|---" * 13 + "|",
    ]
    for row in rows:
        s, held_out = summary(row), row["held_out_kl"]
        lines.append(
            f"| {row['model']} | {row['bits']:g} | {row['texts'][0]}, {row['seqlen']} "
            f"| {row['texts'][1]}, {row['window']} "
            f"| {row['measured_kl']:.5f} ± {row['measured_kl_stderr']:.5f} "
            f"| {row['sum']:.5f} | {row['expected_kl']:.5f} | {s['by_plan']:.2f} "
            f"| {held_out['kl']:.5f} ± {held_out['kl_stderr']:.5f} | {s['by_held_out']:.2f} "
            f"| {100 * s['layers_in_band']:.0f} % | {s['median_layer']:.2f} "
            f"| {s['rank_correlation']:.3f} |"
        )
    return "\n".join(lines) + "\n"


def place(row: dict) -> tuple[str, str, str, int, int, float]:
    """What a row is about; a later one takes the place of an earlier."""
    return row["model"], *row["texts"], row["seqlen"], row["window"], row["bits"]


def draw(rows: list[dict], path: Path) -> None:
    """Left the whole, right every layer: measured over predicted against the budget."""
    fig, (whole, layers) = plt.subplots(1, 2, figsize=(9.6, 4.9))
    models = list(dict.fromkeys(place(row)[:-1] for row in rows))
    for i, key in enumerate(models):
        color, marker = LOOKS[i % len(LOOKS)]
        own = [row for row in rows if place(row)[:-1] == key]
        name, learned, read, seqlen, window = key
        model = f"{name}: {learned}, {seqlen} -> {read}, {window}"
        bits = [row["bits"] for row in own]
        found = [summary(row) for row in own]
        style = {"color": color, "marker": marker}
        whole.plot(bits, [s["by_plan"] for s in found], **style, label=model)
        whole.plot(
            bits, [s["by_held_out"] for s in found], **style,
            linestyle="--", markerfacecolor="white",
        )  # fmt: skip
        for row in own:
            ratios = [v["measured"] / v["predicted"] for v in row["layers"].values()]
            at = np.full(len(ratios), row["bits"] + 0.05 * (i - 1))
            layers.plot(at, ratios, **style, linestyle="none", markersize=3, alpha=0.6)
    for axis, band, title in (
        (whole, (0.85, 1.15), "whole: plan (full), held-out windows (open); band ±15 %"),
        (layers, GOOD_RATIO, "every layer alone (band: 0.7 to 1.4)"),
    ):
        axis.axhspan(*band, color="#EBEBEB")
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set_yscale("log")
        axis.set_yticks([0.5, 0.7, 1.0, 1.4, 2.0, 5.0], ["0.5", "0.7", "1", "1.4", "2", "5"])
        axis.minorticks_off()
        axis.set_xlabel("bits per compressed weight")
        axis.set_title(title, fontsize=10)
    whole.set_ylabel("measured KL / predicted KL")
    handles, labels = whole.get_legend_handles_labels()
    fig.legend(
        handles,
        labels,
        fontsize=8,
        loc="lower center",
        frameon=False,
        title="calibrated on, in windows of -> read, in windows of",
        title_fontsize=8,
    )
    fig.tight_layout(rect=(0, 0.07 + 0.035 * len(models), 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=None, help="folder with models/ and text/")
    parser.add_argument("--models", nargs="+", default=list(CASES))
    parser.add_argument("--bits", nargs="+", type=float, default=[2.0, 2.2, 2.5, 3.0, 4.0])
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--calibration", default=None, help="text below --data in place of CASES'")
    parser.add_argument("--text", default=None, help="text to measure on, below --data, likewise")
    parser.add_argument("--max-tokens", type=int, default=8192)
    parser.add_argument("--work", type=Path, required=True, help="that of benchmarks/quality.py")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/prediction.json"))
    parser.add_argument("--picture", type=Path, default=Path("docs/images/prediction.png"))
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    rows = json.loads(args.out.read_text())["rows"] if args.out.is_file() else []
    for name in args.models:
        if not name.startswith("bundled") and not Path(located(name, args.data)).is_dir():
            print(f"{name} is not there; skipped")
            continue
        for bits in args.bits:
            rows.append(run_cell_of(name, bits, args, args.work))
            rows = list({place(row): row for row in rows}.values())
            rows.sort(key=place)
            args.out.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
            args.out.with_suffix(".md").write_text(table(rows))
    draw(rows, args.picture)
    print(table(rows))


if __name__ == "__main__":
    main()
