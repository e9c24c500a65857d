"""Multiplying by packed codes at batch 1 beside a bfloat16 matrix product of the same shape.

    python benchmarks/decode.py [--sizes 1024 4096] [--pairs 9] [--threads 1] [--only BEGINNING ...]
                                [--out FILE.json]

Trellis codes at L = 14 and rates 1 to 8, the byte-sum and half-sum codes, and E8P. Codes are
random bits: what is timed does not depend on them. One thread each, seconds of that thread's
CPU, since other work on the machine would count otherwise; with more threads, seconds of the
clock. Pairs of one bfloat16 product and one packed product alternate, so that both see the same
machine, and the ratio is the median of the pairs' ratios. Bandwidth is the bytes that a kernel
reads from the packed codes a second, its share that of a copy's reading in the same run, over
buffers as large as the bfloat16 matrix, so from the same level of the memory. Files are written
after every row; rows of other sizes, codes or threads stay in them.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from convex_caldera.core.protocols import FittedQuantizer, Quantizer
from convex_caldera.core.seeds import generator
from convex_caldera.quantizers import E8P, Trellis
from convex_caldera.quantizers.trellis_stream import Tiling
from convex_caldera.runtime.kernels import kernel_for

QUANTIZERS: dict[str, Quantizer] = {
    **{f"weyl, {bits:g} bits": Trellis(bits, 14) for bits in (1.0, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0)},
    "weyl, 4 bits, L = 24, chained": Trellis(4.0, 24, "weyl", 64, "beam"),
    **{f"mul1, {bits:g} bits": Trellis(bits, 14, "mul1") for bits in (2.0, 3.0, 4.0)},
    "3inst, 2 bits": Trellis(2.0, 14, "3inst"),
    **{f"e8p, {bits} bits": E8P(bits) for bits in (2, 3, 4)},
}


def packed_at_random(quantizer: Quantizer, size: int) -> tuple[FittedQuantizer, torch.Tensor]:
    """A fitted quantizer and packed codes of random bits."""
    fitted = quantizer.fit(torch.randn(size, size, generator=generator(0, "decode", "weights")))
    if isinstance(quantizer, Trellis):
        count = Tiling((size, size), quantizer.sixteenths).packed_bytes
    else:
        count = quantizer.layout((size, size))["codes"][1][0]
    noise = generator(0, "decode", "codes")
    return fitted, torch.randint(0, 256, (count,), generator=noise).to(torch.uint8)


def seconds(work: Callable[[], object], repeats: int) -> float:
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    for _ in range(repeats):
        work()
    return (clock() - start) / repeats


def paired(one: Callable[[], object], two: Callable[[], object], pairs: int) -> list[list[float]]:
    """Seconds of both, pair by pair, in alternating order, each long enough for the clock."""
    work = (one, two)
    repeats = [max(1, int(0.01 / max(seconds(w, 2), 1e-6))) for w in work]  # also compiles
    repeats = [max(1, int(0.01 / max(seconds(w, 1), 1e-6))) for w in work]
    found = []
    for index in range(pairs):
        pair = [0.0, 0.0]
        for which in (0, 1) if index % 2 else (1, 0):
            pair[which] = seconds(work[which], repeats[which])
        found.append(pair)
    return found


def measure(quantizer: Quantizer, size: int, pairs: int) -> dict[str, float]:
    fitted, packed = packed_at_random(quantizer, size)
    kernel, x = kernel_for(fitted, "cpu"), torch.randn(1, size)
    W, v = torch.randn(size, size).bfloat16(), x.bfloat16()
    source, target = W.clone(), torch.empty_like(W)
    times = paired(lambda: v @ W.T, lambda: kernel.forward(fitted, packed, x), pairs)
    copies = paired(lambda: v @ W.T, lambda: target.copy_(source), pairs)
    ours = statistics.median(pair[1] for pair in times)
    ratios = [pair[1] / pair[0] for pair in times]
    copy = 2 * size**2 / statistics.median(pair[1] for pair in copies)
    return {
        "size": size,
        "threads": torch.get_num_threads(),
        "bits": 8 * packed.numel() / size**2,
        "milliseconds": 1e3 * ours,
        "bf16_milliseconds": 1e3 * statistics.median(pair[0] for pair in times),
        "ratio": statistics.median(ratios),
        "pairs": pairs,
        "ratio_least": min(ratios),
        "ratio_most": max(ratios),
        "gigabytes_a_second": packed.numel() / ours / 1e9,
        "copy_gigabytes_a_second": copy / 1e9,
        "bandwidth_share": packed.numel() / ours / copy,
        "nanoseconds_a_weight": 1e9 * ours / size**2,
    }


BOUNDS = (
    "A ratio below 1 is faster than bfloat16, which memory bounds. No row of packed codes is bound"
    " by memory: byte sums (mul1) and half sums (3inst) by vector arithmetic on two ports, weyl by"
    " the sixteen table loads of a gather for sixteen weights. Rows of 1024 also carry what a call"
    " costs beside the loop."
)

HEADER = (
    "| codes | size | threads | ms | bf16 ms | time ratio (least .. most) | GB / s |"
    " share of a copy's | ns / weight |\n|---|---|---|---|---|---|---|---|---|"
)


def line(row: dict) -> str:
    return (
        f"| {row['codes']} | {row['size']} | {row['threads']} | {row['milliseconds']:.2f} |"
        f" {row['bf16_milliseconds']:.2f} | {row['ratio']:.2f}"
        f" ({row['ratio_least']:.2f} .. {row['ratio_most']:.2f}) |"
        f" {row['gigabytes_a_second']:.2f} | {100 * row['bandwidth_share']:.1f} % |"
        f" {row['nanoseconds_a_weight']:.2f} |"
    )


def processor() -> str:
    """The name of the processor, where the system tells."""
    found = Path("/proc/cpuinfo")
    lines = found.read_text().splitlines() if found.exists() else []
    names = [text.split(":", 1)[1].strip() for text in lines if text.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def key(row: dict) -> tuple:
    return row["size"], row["threads"], row["codes"]


def save(path: Path, rows: list[dict]) -> None:
    """All rows known so far, as JSON and as a table."""
    record = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": processor(),
        "torch": torch.__version__,
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    intro = f"Batch 1, {record['machine']}, {record['date']}. {BOUNDS}\n\n"
    path.with_suffix(".md").write_text(intro + "\n".join([HEADER, *map(line, rows)]) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", default=[""], help="beginnings of names")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/decode.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    known = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    rows = {key(row): row for row in known}
    print(HEADER)
    for size in args.sizes:
        for name, quantizer in QUANTIZERS.items():
            if name.startswith(tuple(args.only)):
                row = {"codes": name} | measure(quantizer, size, args.pairs)
                rows[key(row)] = row
                print(line(row), flush=True)
                save(args.out, sorted(rows.values(), key=lambda row: (row["size"], row["threads"])))


if __name__ == "__main__":
    main()
