"""What each feature of the objective does to held-out KL: the table by which defaults are chosen.

    python benchmarks/gating.py [--data DIR] [--models bundled ...] [--bits 2.2 3.2]
                                [--seeds 0 1 2] [--variants NAME ...] [--limit SECONDS]
                                [--out benchmarks/results/gating.json]

A cell is one `convex-caldera compress` of a model at a budget with a seed and a variant, reloaded
from disk and compared with the original on text that no calibration has seen. The seed chooses
the calibration windows and the signs of all rotations. The effect of a variant is the change of
KL against its base at the same model, budget and seed; its spread is the standard deviation over
seeds. Finished cells are kept in the JSON file and not run again; a limit stops between two
cells, seeds first, so that what is there is comparable.

Two variants are made by exchanging a part of the library for the run: `e8p menu` offers E8P at 2,
3 and 4 bits where convex-caldera has the trellis, `sequential` fits in order to original weights.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

from quality import CASES, located

from convex_caldera.calibrate.drift import Blend
from convex_caldera.core.recipe import Recipe
from convex_caldera.recipes.lattice import caldera_recipe
from convex_caldera.workflow.compress import compress_to
from convex_caldera.workflow.evaluating import evaluate_models
from convex_caldera.workflow.settings import make_settings

MENU = {"bits_menu": "2,3,4"}
REMEASURED = "convex-caldera, both, remeasured"
TWO_DRAWS = "convex-caldera, both, two draws"


@dataclass(frozen=True)
class Variant:
    """A run, what it is compared with, and the part of the library exchanged for it, if any."""

    name: str
    base: str
    settings: dict[str, object]
    exchanged: str = ""


@dataclass
class Cells:
    """Results so far, on disk."""

    path: Path
    found: dict[str, dict] = field(default_factory=dict)
    notes: dict[str, object] = field(default_factory=dict)

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        record = {**self.notes, "cells": {k: self.found[k] for k in sorted(self.found)}}
        self.path.write_text(json.dumps(record, indent=1) + "\n")
        self.path.with_suffix(".md").write_text(table(self))


def variants() -> list[Variant]:
    """All of them, bases first. `qtip` codes every layer alike, so that only rounding differs."""
    without = {"targets": "original", "shrinkage": "none"}
    qtip = {"method": "qtip", **without}
    kronecker = {**qtip, "curvature": "kronecker"}
    convex = {"method": "convex-caldera", **without}
    drift = {"targets": "drift-corrected"}
    held_out = {"shrinkage": "held-out"}
    both = {**kronecker, **drift}
    default = {**convex, **drift, **held_out}
    plain = {**qtip, "curvature": "input"}
    return [
        Variant("input", "input", plain),
        Variant("input, drift-corrected", "input", {**plain, **drift}),
        Variant("kronecker", "input", kronecker),
        Variant("kronecker, drift-corrected", "kronecker", both),
        Variant("kronecker, shrinkage held-out", "kronecker", {**kronecker, **held_out}),
        Variant("kronecker, both", "kronecker", {**both, **held_out}),
        Variant("convex-caldera", "convex-caldera", convex),
        Variant("convex-caldera, drift-corrected", "convex-caldera", {**convex, **drift}),
        Variant("convex-caldera, held-out", "convex-caldera", {**convex, **held_out}),
        Variant("convex-caldera, both", "convex-caldera", default),
        Variant(REMEASURED, "convex-caldera, both", {**default, "remeasure": True}),
        Variant(TWO_DRAWS, "convex-caldera, both", {**default, "draws": 2}),
        Variant("convex-caldera, e8p menu", "convex-caldera", {**convex, **MENU}, "e8p"),
        Variant("guided", "input", {**qtip, "curvature": "guided"}),
        Variant("input, sequential", "input", {**plain, **drift}, "sequential"),
        Variant("convex-caldera, input", "convex-caldera", {**convex, "curvature": "input"}),
        *(
            Variant(f"kronecker, shrinkage {s}", "kronecker", {**kronecker, "shrinkage": s})
            for s in ("0.05,0.15", "0.1,0.3")
        ),
    ]


@contextmanager
def exchange(part: str) -> Iterator[None]:
    """Another menu, or fits in order to original weights, for one run."""
    if part == "e8p":
        name = "convex_caldera.workflow.offers.convex_caldera_recipe"
        with mock.patch(name, e8p_option):
            yield
    elif part == "sequential":
        nothing = Blend(0.0, 0.0, 0.0, 0.0)
        name = "convex_caldera.workflow.sequential.drift_target"
        with mock.patch(name, lambda W, drift: (W, nothing)):
            yield
    else:
        yield


def e8p_option(bits: float, rank: int = 0, factor_bits: int = 4, state_bits: int = 0) -> Recipe:
    """One option of a menu without trellis; rates between 2, 3 and 4 bits count as the lower."""
    del state_bits
    return caldera_recipe(min(max(math.floor(bits), 2), 4), rank, factor_bits, sweeps=2)


def run_cell(model: str, bits: float, seed: int, variant: Variant, args, folder: Path) -> dict:
    """Compress, reload, compare; statistics of a model and seed are collected once."""
    calibration, evaluation = (located(text, args.data) for text in CASES[model])
    out = folder / "out"
    settings = make_settings(
        model=located(model, args.data), bits=bits, dataset=calibration, seed=seed,
        nsamples=args.nsamples, seqlen=args.seqlen, allow_short=True, **variant.settings,
    )  # fmt: skip
    kept = folder / f"{Path(model).name}-{seed}-{settings.curvature}-{settings.draws}"
    started = time.monotonic()
    try:
        with exchange(variant.exchanged):
            summary = compress_to(settings, out, hessians=kept, workers=args.workers)
        seconds = time.monotonic() - started
        names = [located(model, args.data), str(out)]
        result = evaluate_models(names, evaluation, max_tokens=args.max_tokens).to_dict()
        report = json.loads((out / "convex_caldera" / "report.json").read_text())
    finally:
        shutil.rmtree(out, ignore_errors=True)
    score = result["models"][1]
    keys = ("perplexity", "kl", "kl_stderr", "top1_agreement")
    return {
        "model": Path(model).name, "bits": bits, "seed": seed, "variant": variant.name,
        "bits_per_compressed_weight": summary.bits_per_compressed_weight,
        "seconds": round(seconds, 1), **{key: score[key] for key in keys},
        "shrinkage": report.get("shrinkage"), "drift": mean_drift(report["layers"]),
    }  # fmt: skip


def mean_drift(layers: dict) -> dict[str, float] | None:
    """Means over layers of what the search for a blend found."""
    found = [layer["drift"] for layer in layers.values() if "drift" in layer]
    if not found:
        return None
    return {key: statistics.mean(drift[key] for drift in found) for key in found[0]}


def table(cells: Cells) -> str:
    """Markdown: KL, effect against the base and its spread over seeds, a line a variant."""
    lines = [
        str(cells.notes.get("command", "")),
        "",
        "Effect: mean change of KL against the base at the same seed, and the standard deviation "
        "of that change over seeds. Below zero is better.",
        "",
        "| model | budget | variant | base | seeds | KL | effect | spread | perplexity | s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    rows = list(cells.found.values())
    places = dict.fromkeys((row["model"], row["bits"]) for row in rows)
    for model, bits in sorted(places):
        for variant in variants():
            here = [r for r in rows if (r["model"], r["bits"]) == (model, bits)]
            lines += _line(model, bits, variant, here)
    return "\n".join(lines) + "\n"


def _line(model: str, bits: float, variant: Variant, rows: list[dict]) -> list[str]:
    of = {name: {r["seed"]: r for r in rows if r["variant"] == name and "kl" in r}
          for name in (variant.name, variant.base)}  # fmt: skip
    own, base = of[variant.name], of[variant.base]
    failed = [r["error"] for r in rows if r["variant"] == variant.name and "error" in r]
    head = f"| {model} | {bits:g} | {variant.name} | {variant.base} |"
    if not own:
        return [f"{head} {failed[0]} |"] if failed else []
    changes = [100 * (own[s]["kl"] / base[s]["kl"] - 1) for s in own if s in base]
    effect = f"{statistics.mean(changes):+.1f} %" if changes else "no base"
    spread = f"{statistics.stdev(changes):.1f} %" if len(changes) > 1 else "one seed"
    if variant.name == variant.base:
        effect = spread = ""
    mean = {key: statistics.mean(r[key] for r in own.values()) for key in
            ("kl", "perplexity", "seconds")}  # fmt: skip
    return [
        f"{head} {len(own)} | {mean['kl']:.5f} | {effect} | {spread} "
        f"| {mean['perplexity']:.3f} | {mean['seconds']:.0f} |"
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=None, help="folder with models/ and text/")
    parser.add_argument("--models", nargs="+", default=list(CASES))
    parser.add_argument("--bits", nargs="+", type=float, default=[2.2, 3.2])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", default=[v.name for v in variants()])
    parser.add_argument("--nsamples", type=int, default=48)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=8_000)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds, between cells")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gating.json"))
    args = parser.parse_args()
    cells = Cells(args.out)
    if args.out.is_file():
        cells.found = json.loads(args.out.read_text())["cells"]
    cells.notes = {
        "command": f"`python benchmarks/gating.py --data DATA`: {args.nsamples} windows of "
        f"{args.seqlen} tokens to calibrate, {args.max_tokens} tokens to compare",
        "python": platform.python_version(),
    }
    measure(cells, args)
    print(table(cells))


def measure(cells: Cells, args) -> None:
    """Run what is missing, a model after the other, seeds outermost."""
    began, wanted = time.monotonic(), [v for v in variants() if v.name in args.variants]
    folder = Path(tempfile.mkdtemp(prefix="gating-"))
    try:
        for model in args.models:
            if not model.startswith("bundled") and not Path(located(model, args.data)).is_dir():
                print(f"{model} is not there; skipped")
                continue
            for seed in args.seeds:
                for bits in args.bits:
                    for variant in wanted:
                        key = f"{Path(model).name} {bits:g} {seed} {variant.name}"
                        if "kl" in cells.found.get(key, {}):
                            continue
                        if time.monotonic() - began > args.limit:
                            return
                        cells.found[key] = one(model, bits, seed, variant, args, folder)
                        cells.save()
                for kept in folder.glob(f"{Path(model).name}-{seed}-*"):
                    shutil.rmtree(kept)
    finally:
        shutil.rmtree(folder)


def one(model: str, bits: float, seed: int, variant: Variant, args, folder: Path) -> dict:
    """A cell; one that fails is a row of the table."""
    try:
        row = run_cell(model, bits, seed, variant, args, folder)
    except Exception as error:
        row = {"model": Path(model).name, "bits": bits, "seed": seed, "variant": variant.name,
               "error": f"{type(error).__name__}: {error}"}  # fmt: skip
    print(json.dumps(row), flush=True)
    return row


if __name__ == "__main__":
    main()
