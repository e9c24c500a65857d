"""Distortion of trellis codes on the Gaussian source beside Shannon's limit, and their speed.

    python benchmarks/trellis_distortion.py [--only BEGINNING ...] [--exact NAME ...]
                                            [--columns 256] [--seed 0] [--out FILE.json]
    python benchmarks/trellis_distortion.py --draw docs/distortion.svg

Every row codes one N(0, 1) matrix of 4096 rows; 256 columns make 2^20 weights, and beams of
more than 4096 survivors get a quarter of the columns. Trained tables get sixteen times as many, a
matrix of 4096 x 4096: they are stored once a matrix, and of 2^20 weights 8 KB are 1/16 bit.
Stored bits count packed codes and every side tensor; the ratio is mse / 2^(-2 stored bits), 1 at
Shannon's limit; its standard error comes from the spread over bands of 128 rows. Seconds are of
encoding alone, on this machine under whatever load it had; CPU seconds, summed over threads,
suffer less from it. Rows already in the output file are kept unless they are run again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import time
from pathlib import Path

import torch

from convex_caldera.core.protocols import Quantizer
from convex_caldera.core.seeds import generator
from convex_caldera.quantizers import E8P, NormalFloat, Trellis, Uniform
from convex_caldera.quantizers.trellis_codes import CodeName

ROWS = 4096
CHAIN = 64


def cases() -> dict[str, Quantizer]:
    """Name -> quantizer, in the order of the table."""
    found: dict[str, Quantizer] = {}
    for bits in (1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0):
        for state_bits in (12, 14, 16):
            found[f"weyl-{state_bits}-{bits:g}"] = Trellis(bits, state_bits, "weyl")
    tables = ((8, 2.0), (10, 2.0), (12, 1.0), (12, 2.0), (12, 3.0), (12, 4.0))
    for state_bits, bits in tables:
        found[f"table-{state_bits}-{bits:g}"] = Trellis(bits, state_bits, "table")
    for state_bits in (8, 10):
        found[f"weyl-{state_bits}-2"] = Trellis(2.0, state_bits, "weyl")
    for bits in (1.0, 2.0, 3.0, 4.0):
        found[f"mul1-16-{bits:g}"] = Trellis(bits, 16, "mul1")
        found[f"3inst-16-{bits:g}"] = Trellis(bits, 16, "3inst")
        beams: tuple[tuple[CodeName, int], ...] = (("mul1", 24), ("weyl", 24), ("weyl", 28))
        for code, state_bits in beams:
            for survivors in (1024, 4096, 16384, 65536):
                if bits < 4 or survivors < 65536:
                    found[f"beam-{code}-{state_bits}-{survivors}-{bits:g}"] = Trellis(
                        bits, state_bits, code, CHAIN, "beam", survivors
                    )
    for bits in (5.0, 6.0, 8.0):
        found[f"weyl-16-{bits:g}"] = Trellis(bits, 16, "weyl")
    for bits in (2, 3, 4):
        found[f"e8p-{bits}"] = E8P(bits)
        found[f"normal-float-{bits}"] = NormalFloat(bits, 0)
        found[f"uniform-{bits}"] = Uniform(bits, 0)
    return found


def width(quantizer: Quantizer, columns: int) -> int:
    """Columns of a case: fewer of a slow one, more where a table is stored."""
    if not isinstance(quantizer, Trellis):
        return columns
    if quantizer.code == "table":
        return 16 * columns
    return columns // 4 if quantizer.encoder == "beam" and quantizer.survivors > 4096 else columns


def measure(quantizer: Quantizer, columns: int, seed: int) -> dict[str, object]:
    W = torch.randn((ROWS, columns), generator=generator(seed, "gaussian", "distortion"))
    fitted = quantizer.fit(W)
    fitted.encode(W[:, : min(columns, 16)])  # compile first
    began, worked = time.perf_counter(), time.process_time()
    codes = fitted.encode(W)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - worked
    error = (fitted.decode(codes) - W).double().square()
    side = sum(t.numel() * t.element_size() for t in fitted.tensors().values())
    bits = 8 * (fitted.pack(codes).numel() + side) / W.numel()
    # independent shares: bands of 128 rows, which no tile crosses
    shares = error.reshape(ROWS // 128, -1).mean(dim=1)
    mse = error.mean().item()
    return {
        "quantizer": {"kind": quantizer.kind, **dataclasses.asdict(quantizer)},  # type: ignore[call-overload]
        "weights": W.numel(),
        "seed": seed,
        "mse": mse,
        "stored_bits": bits,
        "ratio": mse * 4.0**bits,
        "ratio_standard_error": (shares.std() / len(shares) ** 0.5).item() * 4.0**bits,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "threads": torch.get_num_threads(),
    }


def table(rows: dict[str, dict]) -> str:
    lines = [
        "| case | stored bits | mse | ratio to 2^(-2R) | +- | weights / s | / CPU s | weights |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        lines.append(
            f"| {name} | {row['stored_bits']:.4f} | {row['mse']:.6f} | {row['ratio']:.4f} |"
            f" {row['ratio_standard_error']:.4f} | {row['weights'] / row['seconds']:.0f} |"
            f" {row['weights'] / row['cpu_seconds']:.0f} | {row['weights']} |"
        )
    return "\n".join(lines) + "\n"


def draw(rows: dict[str, dict], path: Path) -> None:
    """Ratio to Shannon's limit against stored bits, one line a family."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "distortion"
    families = {
        "trellis, L = 24, beam of 16384": ("beam-weyl-24-16384-", "o-"),
        "trellis, L = 24, beam of 4096": ("beam-weyl-24-4096-", "s-"),
        "trellis, L = 16, exact": ("weyl-16-", "^-"),
        "trellis, L = 14, exact (default)": ("weyl-14-", "v-"),
        "trellis, L = 12, exact": ("weyl-12-", "d-"),
        "trellis, L = 16, mul1 (QTIP-like)": ("mul1-16-", "x--"),
        "E8P": ("e8p-", "P:"),
        "normal float, per row": ("normal-float-", "*:"),
        "uniform, per row": ("uniform-", "1:"),
    }
    figure, axes = plt.subplots(figsize=(8, 5))
    for label, (start, style) in families.items():
        found = [row for name, row in rows.items() if name.startswith(start)]
        points = sorted((row["stored_bits"], row["ratio"]) for row in found)
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label)
    axes.axhline(1.0, color="black", linewidth=1)
    axes.text(1.05, 1.005, "Shannon, mse = 2^(-2R)")
    axes.set(xlabel="stored bits a weight", ylabel="mse / 2^(-2R), N(0, 1)", yscale="log")
    ticks = (1.0, 1.05, 1.1, 1.2, 1.4, 1.6, 2.0, 3.0)
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def wanted(name: str, args: argparse.Namespace) -> bool:
    if args.only is None and args.exact is None:
        return True
    return name in (args.exact or ()) or name.startswith(tuple(args.only or ()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", help="beginnings of names")
    parser.add_argument("--exact", nargs="+", help="names")
    parser.add_argument("--columns", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/trellis_distortion.json")
    )
    parser.add_argument("--draw", type=Path, help="only draw what the output file holds")
    args = parser.parse_args()
    known = cases()
    rows = json.loads(args.out.read_text())["rows"] if args.out.exists() else {}
    if args.draw is not None:
        draw(rows, args.draw)
        return
    for name, quantizer in known.items():
        if not wanted(name, args):
            continue
        rows[name] = measure(quantizer, width(quantizer, args.columns), args.seed)
        rows = {key: rows[key] for key in known if key in rows}
        print(table({name: rows[name]}).splitlines()[-1], flush=True)
        record = {"machine": platform.processor() or platform.machine(), "rows": rows}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(table(rows))


if __name__ == "__main__":
    main()
