"""What fine-tuning wins back: held-out perplexity and KL before, after blocks, after the model.

    python benchmarks/finetune.py [--data DIR] [--models bundled ...] [--bits 2.02 2.2]
                                  [--methods caldera convex-caldera] [--work DIR] [--ranks 16 64]
                                  [--train scales,codebooks,norms]
                                  [--out benchmarks/results/finetune.json]

A cell compresses a model, tunes it block by block, then as a whole, each phase from the directory
before it, and evaluates all of them beside the original on a text that neither calibration nor
training has seen. `won_back` is the share of the lost quality: 1 - KL after / KL before, and the
same of the perplexity above the original's. `--ranks R S` adds the question of RILQ at equal
bytes: rank R, trained and so kept in 16 bits, against rank S = 4 R in 4 bits, untrained.

`untuned at that size` is the control where files grow, as trained factors and vectors are kept in
16 bits: the same method given the bytes that the tuned model takes. Scales, codebooks and norms
stay as large as they were, so that `before` is their control.

Folders under --work are reused, so that cells can be run one by one; rows of --out are replaced by
those with the same name. CPU seconds are those of the process, whatever else the machine did.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import tempfile
import time
from pathlib import Path

import torch
from quality import located

from convex_caldera.errors import ConvexCalderaError
from convex_caldera.recipes.table import METHODS
from convex_caldera.storage import open_container
from convex_caldera.workflow.compress import compress_to
from convex_caldera.workflow.evaluating import evaluate_models
from convex_caldera.workflow.finetuning import finetune_to
from convex_caldera.workflow.progress import Lines
from convex_caldera.workflow.settings import make_settings
from convex_caldera.workflow.tuning_settings import DEFAULT_PARTS, make_tune_settings

# model -> texts to calibrate on, to train on, to evaluate on; paths are below --data.
CASES = {
    "bundled": ("bundled:calibration", "bundled:train", "bundled:test"),
    "models/TinyStories-656K": (
        "text/tinystories_train_2mb.txt",
        "text/tinystories_train_2mb.txt",
        "text/tinystories_valid_a.txt",
    ),
    "models/wiki-llama-14m": (
        "text/c4_sample_a.txt",
        "text/c4_sample_a.txt",
        "text/wikipedia_en_2018_valid.txt",
    ),
}
PARTS = ",".join(DEFAULT_PARTS)


def timed(work, *arguments, **options) -> dict:
    """Wall and CPU seconds of a call, peak memory of the process so far, and what it returned."""
    wall, cpu = time.monotonic(), time.process_time()
    result = work(*arguments, **options)
    return {
        "result": result,
        "seconds": round(time.monotonic() - wall, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def compressed(model: str, text: str, method: str, bits: float, out: Path, **options) -> dict:
    """Compress into `out` unless it is there."""
    if (out / "convex_caldera" / "manifest.json").is_file():
        return {}
    settings = make_settings(
        model=model, method=method, bits=bits, dataset=text, allow_short=True, **options
    )
    spent = timed(compress_to, settings, out, progress=Lines(every=60), workers=1)
    return {k: v for k, v in spent.items() if k != "result"}


def tuned(directory: Path, out: Path, scope: str, model: str, text: str, parts: str, args) -> dict:
    """Tune into `out` unless it is there; the figures of its phase, kept beside it."""
    record = out.with_name(out.name + ".figures.json")
    if record.is_file():
        return json.loads(record.read_text())
    settings = make_tune_settings(
        directory=str(directory), model=model, scope=scope, train=tuple(parts.split(",")),
        dataset=text, nsamples=args.nsamples[scope == "model"], seqlen=args.seqlen,
        epochs=args.epochs[scope == "model"], lr=args.lr[scope == "model"],
        patience=0, evaluations=2, time_budget=args.time_budget, allow_short=True,
    )  # fmt: skip
    spent = timed(finetune_to, settings, out, progress=Lines(every=60))
    summary = spent.pop("result")
    (phase,) = summary.phases
    spent |= {
        "validation_before": phase.before,
        "validation_after": phase.after,
        "steps": phase.steps,
        "trained_numbers": summary.trained_numbers,
        "note": phase.note,
    }
    record.write_text(json.dumps(spent))
    return spent


def evaluated(directories: list[Path], model: str, text: str, args) -> list[dict]:
    """Scores of the directories, the original's first, with their bits."""
    names = [model, *map(str, directories)]
    scores = evaluate_models(names, text, max_tokens=args.max_tokens).to_dict()["models"]
    keys = ("perplexity", "perplexity_stderr", "kl", "kl_stderr", "top1_agreement")
    rows = [{key: score[key] for key in keys} for score in scores]
    for row, directory in zip(rows[1:], directories, strict=True):
        sizes = open_container(directory, verify=False).sizes()
        row["bits"] = sizes.bits_per_compressed_weight
        row["compressed_bytes"] = sizes.compressed_bytes
    return rows


def training(args) -> dict:
    """How the phases of a cell were trained, block and model."""
    return {"windows": args.nsamples, "epochs": args.epochs, "lr": args.lr, "train": args.train}


def won_back(rows: list[dict]) -> None:
    """Shares of the lost KL and perplexity that each phase has won back, into the rows."""
    original, before = rows[0], rows[1]
    for row in rows[2:]:
        row["won_back_kl"] = 1 - row["kl"] / before["kl"]
        lost = before["perplexity"] - original["perplexity"]
        row["won_back_perplexity"] = (before["perplexity"] - row["perplexity"]) / lost


def run_cell(name: str, method: str, bits: float, args) -> list[dict]:
    """Before, after blocks, after the model."""
    calibration, trained_on, held_out = (located(text, args.data) for text in CASES[name])
    model, short = located(name, args.data), Path(name).name
    folder = args.work / f"{short}-{method}-{bits:g}"
    phases = [compressed(model, calibration, method, bits, folder / "before")]
    done = [folder / "before"]
    for scope in ("block", "model"):
        out = folder / f"{scope}-{args.train.replace(',', '-')}"
        phases.append(tuned(done[-1], out, scope, model, trained_on, args.train, args))
        done.append(out)
    before, after = (open_container(out, verify=False).sizes() for out in (done[0], done[-1]))
    if after.compressed_bytes > before.compressed_bytes:
        done.append(folder / f"control-{args.train.replace(',', '-')}")
        size = after.bits_per_compressed_weight
        phases.append(compressed(model, calibration, method, size, done[-1]))
    rows = evaluated(done, model, held_out, args)
    won_back(rows)
    cell = {"model": short, "method": method, "budget_bits": bits, **training(args)}
    cell |= {"max_tokens": args.max_tokens}
    labels = ("original", "before", "after blocks", "after model", "untuned at that size")
    return [
        cell | {"phase": label} | row | phase
        for label, row, phase in zip(labels, rows, ({}, *phases), strict=False)
    ]


def run_ranks(name: str, ranks: tuple[int, int], bits: float, args) -> list[dict]:
    """Rank R trained against rank S untrained, 2-bit codes, equal bytes."""
    calibration, trained_on, held_out = (located(text, args.data) for text in CASES[name])
    model, short = located(name, args.data), Path(name).name
    folder = args.work / f"{short}-ranks-{ranks[0]}-{ranks[1]}"
    pin = ("re:.*=bits:2",)
    small, large = (folder / f"rank-{rank}" for rank in ranks)
    made = [
        compressed(model, calibration, "caldera", bits, out, rank=rank, pin=pin)
        for rank, out in zip(ranks, (small, large), strict=True)
    ]
    spent = tuned(small, folder / "tuned", "model", model, trained_on, "lowrank", args)
    rows = evaluated([small, large, folder / "tuned"], model, held_out, args)
    labels = ("original", f"rank {ranks[0]}, 4-bit factors", f"rank {ranks[1]}, 4-bit factors",
              f"rank {ranks[0]} trained, 16-bit factors")  # fmt: skip
    method = f"caldera ranks {ranks[0]}/{ranks[1]}"
    cell = {"model": short, "method": method, "budget_bits": bits, **training(args)}
    cell["train"] = "lowrank"
    return [
        cell | {"phase": label} | row | more
        for label, row, more in zip(labels, rows, ({}, *made, spent), strict=True)
    ]


def table(rows: list[dict]) -> str:
    """Markdown, one line per phase."""
    lines = [
        "| model | method | trained | phase | bits/weight | perplexity | KL | top-1 "
        "| won back (KL) | won back (ppl) | steps | CPU s | s | MB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        if "error" in r:
            lines.append(f"| {r['model']} | {r['method']} | {r['error']} |")
            continue
        share = [f"{100 * r[k]:.0f} %" if k in r else "" for k in
                 ("won_back_kl", "won_back_perplexity")]  # fmt: skip
        spent = [f"{r[k]:g}" if k in r else "" for k in
                 ("steps", "cpu_seconds", "seconds", "peak_memory_mb")]  # fmt: skip
        bits = f"{r['bits']:.3f}" if "bits" in r else "-"
        lines.append(
            f"| {r['model']} | {r['method']} {r['budget_bits']:g} | {r['train']} | {r['phase']} "
            f"| {bits} "
            f"| {r['perplexity']:.3f} ± {r['perplexity_stderr']:.3f} "
            f"| {r['kl']:.5f} ± {r['kl_stderr'] or 0:.5f} | {100 * r['top1_agreement']:.2f} % "
            f"| {' | '.join(share + spent)} |"
        )
    return "\n".join(lines) + "\n"


def _cell(row: dict) -> tuple:
    windows = tuple(row.get("windows", ()))
    return row["model"], row["method"], row["budget_bits"], row.get("train"), windows


def save(new: list[dict], skipped: list[str], args) -> None:
    """Replace the rows of the same cells in --out, and write its Markdown twin."""
    old = json.loads(args.out.read_text())["rows"] if args.out.is_file() else []
    keys = {_cell(row) for row in new}
    rows = [row for row in old if _cell(row) not in keys] + new
    record = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "seqlen": args.seqlen,
        "skipped": skipped,
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(table(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=None, help="folder with models/ and text/")
    parser.add_argument("--models", nargs="+", default=["bundled"], choices=list(CASES))
    parser.add_argument("--methods", nargs="*", default=["caldera", "convex-caldera"])
    parser.add_argument("--bits", nargs="+", type=float, default=[2.02, 2.2])
    parser.add_argument("--ranks", nargs=2, type=int, default=None, metavar=("R", "S"))
    parser.add_argument("--rank-bits", type=float, default=3.5)
    parser.add_argument("--train", default=PARTS)
    parser.add_argument("--nsamples", nargs=2, type=int, default=[128, 512], help="block, model")
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--epochs", nargs=2, type=float, default=[1.0, 1.0], help="block, model")
    parser.add_argument("--lr", nargs=2, type=float, default=[2e-3, 5e-3], help="block, model")
    parser.add_argument("--time-budget", type=float, default=None)
    parser.add_argument("--max-tokens", type=int, default=40_000)
    parser.add_argument("--work", type=Path, default=None, help="kept and reused; else temporary")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/finetune.json"))
    args = parser.parse_args()
    args.work = args.work or Path(tempfile.mkdtemp(prefix="finetune-"))
    skipped = [
        m for m in args.models if m != "bundled" and not Path(located(m, args.data)).is_dir()
    ]
    skipped += [m for m in args.methods if m not in METHODS]
    for name in args.models:
        jobs = [(run_cell, name, m, b) for m in args.methods for b in args.bits if m in METHODS]
        jobs += [(run_ranks, name, tuple(args.ranks), args.rank_bits)] if args.ranks else []
        for job, *what in jobs:
            if name in skipped:
                continue
            try:
                rows = job(*what, args)
            except ConvexCalderaError as error:  # a cell that cannot be made is a row of the table
                rows = [{"model": Path(name).name, "method": str(what[1]), "train": args.train,
                         "budget_bits": what[2], "error": str(error)}]  # fmt: skip
            print(table(rows), flush=True)
            save(rows, skipped, args)


if __name__ == "__main__":
    main()
