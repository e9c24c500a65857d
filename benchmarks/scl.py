"""Source-coding baselines: distortion, rates, speed of coding, and lossless savings.

    python benchmarks/scl.py [--columns 1024] [--large 100000000] [--models DIR ...] [--seed 0]
                             [--spend MODEL] [--out FILE.json]

Distortion is the mean squared error on an N(0, 1) matrix of 1024 rows: nominal bits are the
width of the codes, entropy their empirical entropy of order 0, stored bits every byte with
codebook and scales, codes by rANS where that is shorter; the ratio is to Shannon's limit at the
stored bits. `--large` weights are fitted and encoded by Lloyd-Max, and as many symbols coded and
decoded. Each of `--models`, directories with safetensors weights, has its
tensors outside the decoder's linear layers coded losslessly. `--spend` compresses a model to 4 bits
per weight with and without a coder. 0 columns, 0 weights or no models
leave that part of the output file as it is. CPU seconds suffer less than
seconds from whatever else the machine did.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch

from convex_caldera.coding import Huffman, Rans
from convex_caldera.coding.symbols import entropy, symbol_bits
from convex_caldera.core.protocols import Quantizer
from convex_caldera.core.seeds import generator
from convex_caldera.core.terms import Coded
from convex_caldera.models.resolve import resolve_model
from convex_caldera.quantizers import ECSQ, ECVQ, ClippedUniform, KMeans, LloydMax, NormalFloat
from convex_caldera.storage.lossless import CODED_DTYPES, split_rest
from convex_caldera.storage.source import SourceModel
from convex_caldera.workflow.compress import compress_to
from convex_caldera.workflow.settings import make_settings

ROWS = 1024
GOLDEN = {"lloyd-max-1": 0.3634, "lloyd-max-2": 0.1175, "lloyd-max-3": 0.0345}
GOLDEN |= {"lloyd-max-4": 0.0095, "ecsq-2": 0.0889}
T = TypeVar("T")


def cases() -> dict[str, Quantizer]:
    """Name -> quantizer, in the order of the table."""
    found: dict[str, Quantizer] = {}
    for bits in (1, 2, 3, 4, 8):
        found[f"scalar-uniform-{bits}"] = ClippedUniform(bits)
        found[f"lloyd-max-{bits}"] = LloydMax(bits)
    for bits in (2, 3, 4):
        found[f"nf{bits}-64"] = NormalFloat(bits, 64)
    for rate, dim in ((1.0, 8), (1.0, 4), (2.0, 2), (2.0, 4), (3.0, 2)):
        found[f"vq-{rate:g}-dim{dim}"] = KMeans(rate, dim)
    for rate in (0.5, 1.0, 2.0, 3.0, 4.0):
        found[f"ecsq-{rate:g}"] = ECSQ(rate)
    for rate, dim in ((0.5, 8), (1.0, 4), (2.0, 2)):
        found[f"ecvq-{rate:g}-dim{dim}"] = ECVQ(rate, dim)
    return found


def timed(work: Callable[[], T]) -> tuple[T, float, float]:
    """(result, seconds, CPU seconds)."""
    start, cpu = time.monotonic(), time.process_time()
    result = work()
    return result, time.monotonic() - start, time.process_time() - cpu


def distortion(name: str, quantizer: Quantizer, W: torch.Tensor) -> dict[str, Any]:
    """One row of the table."""
    fitted, _, fit_seconds = timed(lambda: quantizer.fit(W))
    codes, _, encode_seconds = timed(lambda: fitted.encode(W))
    mse = float((fitted.decode(codes) - W).double().square().mean())
    width = symbol_bits(quantizer)
    term = Coded(codes, fitted, Rans(width))
    stored = 8 * term.stored_bytes() / W.numel()
    return {
        "name": name,
        "mse": mse,
        "golden": GOLDEN.get(name),
        "nominal_bits": 8 * term.packed.numel() / W.numel(),
        "entropy_bits": entropy(term.packed, width) / W.numel(),
        "stored_bits": stored,
        "shannon_ratio": mse * 4.0**stored,
        "fit_cpu_seconds": fit_seconds,
        "encode_cpu_seconds": encode_seconds,
    }


def large(count: int, seed: int) -> list[dict[str, Any]]:
    """Lloyd-Max and both coders on `count` weights."""
    shape = (count // 10_000, 10_000)
    W = torch.randn(shape, generator=generator(seed, "large", "scl benchmark"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    quantizer = LloydMax(4)
    quantizer.fit(W[:8])  # compiled
    rows = []
    fitted, seconds, cpu = timed(lambda: quantizer.fit(W))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    rows.append(row("Lloyd-Max fit, 4 bits", count, seconds, cpu, f"{grown:.0f} MB above the data"))
    codes, seconds, cpu = timed(lambda: fitted.encode(W))
    rows.append(row("Lloyd-Max encode", count, seconds, cpu, ""))
    packed = fitted.pack(codes)
    ideal = entropy(packed, 4) / 8
    del codes
    for coder in (Rans(4), Huffman(4)):
        small = coder.encode(packed[:1000])
        coder.decode(small, 1000)  # compiled
        stream, seconds, cpu = timed(lambda c=coder: c.encode(packed))  # type: ignore[misc]
        excess = f"{100 * (stream.numel() / ideal - 1):.3f} % above the entropy"
        rows.append(row(f"{coder.kind} encode", count, seconds, cpu, excess))
        again, seconds, cpu = timed(lambda c=coder, s=stream: c.decode(s, packed.numel()))  # type: ignore[misc]
        assert torch.equal(again, packed)
        rows.append(row(f"{coder.kind} decode", count, seconds, cpu, "equal to the last bit"))
    return rows


def row(what: str, count: int, seconds: float, cpu: float, remark: str) -> dict[str, Any]:
    return {
        "what": what,
        "count": count,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "remark": remark,
    }


def lossless(model: str) -> dict[str, Any]:
    """What stays in its precision when every two-dimensional decoder weight is compressed."""
    source = SourceModel(resolve_model(model))
    kept = [
        info
        for info in source.infos.values()
        if info.dtype in CODED_DTYPES and not (".layers." in info.name and len(info.shape) == 2)
    ]
    (plain, coded), _, cpu = timed(lambda: split_rest(source, kept))
    before = sum(info.num_bytes for info in kept)
    after = sum(info.num_bytes for info in plain) + sum(tensor.num_bytes for tensor in coded)
    return {
        "model": Path(model).name,
        "dtypes": sorted({info.dtype for info in kept}),
        "bytes": before,
        "stored_bytes": after,
        "saved": 1 - after / before,
        "cpu_seconds": cpu,
    }


def spent(model: str) -> list[dict[str, Any]]:
    """Every uniform method at 4 bits per weight, codes at fixed width and coded."""
    rows = []
    for method in ("scl-scalar-uniform", "scl-lloyd-max", "scl-vector-vq", "rtn"):
        for coder in (None, "rans", "huffman"):
            settings = make_settings(model=model, method=method, bits=4, coder=coder)
            with TemporaryDirectory() as folder:
                found, _, cpu = timed(
                    lambda settings=settings, folder=folder: compress_to(
                        settings, Path(folder) / "out", workers=1
                    )
                )
            rows.append(
                {
                    "model": Path(model).name,
                    "method": method,
                    "coder": coder or "none",
                    "bits": found.bits_per_compressed_weight,
                    "relative_loss": found.mean_relative_loss,
                    "cpu_seconds": cpu,
                }
            )
    return rows


def markdown(record: dict[str, Any]) -> str:
    """The tables."""
    lines = [
        f"# Source coding, {record.get('weights', 0):,} Gaussian weights",
        "",
        "| quantizer | mse | golden | nominal | entropy | stored | x Shannon | fit, CPU s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in record["distortion"]:
        golden = "" if r["golden"] is None else f"{r['golden']:.4f}"
        lines.append(
            f"| {r['name']} | {r['mse']:.5f} | {golden} | {r['nominal_bits']:.3f} "
            f"| {r['entropy_bits']:.4f} | {r['stored_bits']:.4f} | {r['shannon_ratio']:.3f} "
            f"| {r['fit_cpu_seconds']:.1f} |"
        )
    if record["large"]:
        lines += ["", "| step | count | seconds | CPU seconds | |", "|---|---|---|---|---|"]
        lines += [
            f"| {r['what']} | {r['count']:,} | {r['seconds']:.1f} | {r['cpu_seconds']:.1f} "
            f"| {r['remark']} |"
            for r in record["large"]
        ]
    if record["lossless"]:
        lines += [
            "",
            "| kept tensors of | types | bytes | stored | saved |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {r['model']} | {', '.join(r['dtypes'])} | {r['bytes']:,} | {r['stored_bytes']:,} "
            f"| {100 * r['saved']:.1f} % |"
            for r in record["lossless"]
        ]
    if record.get("spent"):
        lines += [
            "",
            "| 4 bits per weight asked for | coder | stored bits | mean relative error | CPU s |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {r['model']} {r['method']} | {r['coder']} | {r['bits']:.4f} "
            f"| {r['relative_loss']:.5f} | {r['cpu_seconds']:.1f} |"
            for r in record["spent"]
        ]
    machine = record["machine"]
    return "\n".join(
        [*lines, "", f"{machine['processor']}, torch {machine['torch']}, 1 thread.", ""]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--columns", type=int, default=1024)
    parser.add_argument("--large", type=int, default=100_000_000)
    parser.add_argument("--models", nargs="*", default=["bundled"])
    parser.add_argument("--spend", default="", help="model to compress with and without a coder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/scl.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    record: dict[str, Any] = {"distortion": [], "large": [], "lossless": []}
    if options.out.exists():
        record = json.loads(options.out.read_text())
    record["machine"] = {
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
    }
    if options.columns:
        W = torch.randn(ROWS, options.columns, generator=generator(options.seed, "gaussian", "scl"))
        LloydMax(2).fit(W[:4])  # compiled
        KMeans(1.0, 2).fit(W[:4])
        record |= {"weights": W.numel(), "seed": options.seed}
        record["distortion"] = [distortion(name, q, W) for name, q in cases().items()]
    if options.large:
        record["large"] = large(options.large, options.seed)
    if options.models:
        record["lossless"] = [lossless(model) for model in options.models]
    if options.spend:
        record["spent"] = spent(options.spend)
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(markdown(record))
    print(markdown(record))


if __name__ == "__main__":
    main()
