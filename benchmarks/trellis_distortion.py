"""Distortion of trellis codes on the Gaussian source beside Shannon's limit, and their speed.

    python benchmarks/trellis_distortion.py [--only NAME ...] [--columns 256] [--seed 0]
                                            [--out benchmarks/results/trellis_distortion.json]

Every row codes one N(0, 1) matrix of 4096 rows; 256 columns make 2^20 weights, and beams of
more than 4096 survivors get a quarter of the columns. Stored bits count packed codes and every
side tensor; the ratio is mse / 2^(-2 stored bits), 1 at Shannon's limit; its standard error
comes from the spread over bands of 128 rows. Seconds are of encoding alone, on this machine
under whatever load it had. Rows already in the output file are kept unless they are run again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import time
from pathlib import Path

import numba
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


def share(quantizer: Quantizer) -> int:
    """By how much a slow case is cut down."""
    slow = isinstance(quantizer, Trellis) and quantizer.encoder == "beam"
    return 4 if slow and quantizer.survivors > 4096 else 1


def measure(quantizer: Quantizer, columns: int, seed: int) -> dict[str, object]:
    W = torch.randn((ROWS, columns), generator=generator(seed, "gaussian", "distortion"))
    fitted = quantizer.fit(W)
    fitted.encode(W[:, : min(columns, 16)])  # compile first
    began = time.perf_counter()
    codes = fitted.encode(W)
    seconds = time.perf_counter() - began
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
        "weights_per_second": W.numel() / seconds,
        "threads": numba.get_num_threads(),
    }


def table(rows: dict[str, dict]) -> str:
    lines = [
        "| case | stored bits | mse | ratio to 2^(-2R) | +- | weights / s | weights |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        lines.append(
            f"| {name} | {row['stored_bits']:.4f} | {row['mse']:.6f} | {row['ratio']:.4f} |"
            f" {row['ratio_standard_error']:.4f} | {row['weights_per_second']:.0f} |"
            f" {row['weights']} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=None, help="names or their beginnings")
    parser.add_argument("--columns", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/trellis_distortion.json")
    )
    args = parser.parse_args()
    known = cases()
    rows = json.loads(args.out.read_text())["rows"] if args.out.exists() else {}
    for name, quantizer in known.items():
        if args.only is not None and not any(name.startswith(start) for start in args.only):
            continue
        rows[name] = measure(quantizer, args.columns // share(quantizer), args.seed)
        rows = {key: rows[key] for key in known if key in rows}
        print(table({name: rows[name]}).splitlines()[-1], flush=True)
        record = {"machine": platform.processor() or platform.machine(), "rows": rows}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(table(rows))


if __name__ == "__main__":
    main()
