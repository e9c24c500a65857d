"""Throughput of models by name, the original first, each in a process of its own.

A fresh process per model, so that the peak of memory is that of one model, and none profits from
what another has warmed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from convex_caldera.errors import CheckError, RecipeError
from convex_caldera.evaluate.table import plain_table
from convex_caldera.evaluate.throughput import measure_throughput, memory_bandwidth, weight_bytes
from convex_caldera.workflow.models import open_model, usable_device
from convex_caldera.workflow.progress import Progress, Silent
from convex_caldera.workflow.summary import peak_memory_bytes

_HEADINGS = (
    "model", "batch", "prefill tokens/s", "decode tokens/s", "ms per step", "of roofline",
    "weights in memory, MB", "peak memory, MB", "decode / original",
)  # fmt: skip


@dataclass(frozen=True)
class BenchOptions:
    """Batch sizes, tokens of prompt and answer, repeats, device and dtype of computation."""

    batches: tuple[int, ...] = (1, 8, 64)
    prompt_tokens: int = 128
    new_tokens: int = 32
    repeats: int = 3
    device: str = "cpu"
    dtype: str = "float32"


@dataclass(frozen=True)
class Bench:
    """Rows of every model and batch size."""

    record: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return self.record

    def text(self) -> str:
        first = {r["batch"]: r for r in self.record["models"][0]["rows"]}
        rows = []
        for model in self.record["models"]:
            for row in model["rows"]:
                base = first[row["batch"]]["decode_tokens_per_second"]
                peak = row["peak_memory_bytes"] or model["peak_memory_bytes"]
                rows.append(
                    (
                        model["name"],
                        str(row["batch"]),
                        f"{row['prefill_tokens_per_second']:,.0f}",
                        f"{row['decode_tokens_per_second']:,.1f}",
                        f"{1000 * row['decode_seconds']:.2f}",
                        f"{row['roofline_share']:.1%}",
                        f"{model['weight_bytes'] / 1e6:,.1f}",
                        f"{peak / 1e6:,.0f}",
                        f"{row['decode_tokens_per_second'] / base:.2f}x",
                    )
                )
        options = self.record["options"]
        bandwidth = self.record["models"][0]["bandwidth_bytes_per_second"] / 1e9
        return (
            f"{plain_table(_HEADINGS, rows)}\n\nprompts of {options['prompt_tokens']} tokens, "
            f"{options['new_tokens']} new ones, {options['dtype']} on {options['device']}, "
            f"{self.record['threads']} threads; memory bandwidth {bandwidth:.1f} GB/s measured"
        )


def bench_models(
    names: Sequence[str], options: BenchOptions, *, progress: Progress | None = None
) -> Bench:
    """Prefill and decode of each model at each batch size.

    Raises:
        RecipeError: an option is out of range; ModelError, FormatError: as `open_model`.
        CheckError: the process of a model failed; it has said why.
    """
    _check(names, options)
    progress = progress or Silent()
    progress.start("models", len(names))
    records = []
    for name in names:
        records.append(bench_one(name, options) if len(names) == 1 else _fresh(name, options))
        progress.advance(name)
    return Bench(
        {"models": records, "options": asdict(options), "threads": torch.get_num_threads()}
    )


def bench_one(name: str, options: BenchOptions) -> dict[str, Any]:
    """One model in this process."""
    reference = open_model(name)
    bandwidth = memory_bandwidth(usable_device(options.device))
    model = reference.load(options.device, getattr(torch, options.dtype))
    rows = [
        measure_throughput(
            name, model, batch, prompt_tokens=options.prompt_tokens,
            new_tokens=options.new_tokens, repeats=options.repeats, bandwidth=bandwidth,
        )
        for batch in options.batches
    ]  # fmt: skip
    return {
        "name": name,
        "file_bytes": reference.file_bytes,
        "bits_per_weight": reference.bits_per_weight,
        "weight_bytes": weight_bytes(model),
        "peak_memory_bytes": peak_memory_bytes(),
        "bandwidth_bytes_per_second": bandwidth,
        "rows": [asdict(row) for row in rows],
    }


def _fresh(name: str, options: BenchOptions) -> dict[str, Any]:
    """The same in a new process of this program."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bench.json"
        command = [
            sys.executable, "-m", "convex_caldera", "bench", name, "--batches",
            ",".join(map(str, options.batches)), "--prompt-tokens", str(options.prompt_tokens),
            "--new-tokens", str(options.new_tokens), "--repeats", str(options.repeats),
            "--device", options.device, "--dtype", options.dtype, "--json", str(path),
        ]  # fmt: skip
        done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
        if done.returncode != 0:
            raise CheckError(f"bench {name} failed with code {done.returncode}")
        return json.loads(path.read_text(encoding="utf-8"))["models"][0]


def _check(names: Sequence[str], options: BenchOptions) -> None:
    if not names or len(set(names)) < len(names):
        raise RecipeError(f"bench needs different models, got {list(names)}")
    if not options.batches or min(options.batches) < 1:
        raise RecipeError(f"batch sizes must be at least 1, got {options.batches}")
    if options.dtype not in ("float32", "float16", "bfloat16"):
        raise RecipeError(f"dtype {options.dtype!r} is none of float32, float16, bfloat16")
    for name in names:
        open_model(name)
