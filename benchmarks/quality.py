"""Every method beside the original at equal file bytes: perplexity, KL and agreement.

    python benchmarks/quality.py [--data DIR] [--models bundled ...] [--bits 2.2 3.2 4.2]
                                 [--methods rtn gptq ...] [--work DIR]
                                 [--out benchmarks/results/quality.json]

Each cell is one `convex-caldera compress` within the same budget, reloaded from disk, and all
cells of a model and budget are evaluated on the same tokens in one run, the original first.
Calibration and evaluation texts are different: see CASES. Models under --data are skipped, and
the table says so, where the folder is absent. Methods share the statistics of a model, which the
first that needs them collects, and the budgets of reallm its measured options. Seconds are those of
this machine under whatever load it had, what the cell collected for others included; compare them
within one run only.

With --work, outputs stay there and a run that was cut short goes on where it was. Models, budgets
and methods that are not asked for keep their rows in the table.

A method may be followed by the format that activations are rounded to: `l2qer+mxint8/16` is W4A8
at a budget of 4 bits (docs/activations.md).
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import tempfile
from pathlib import Path

from convex_caldera.recipes.table import METHODS as KNOWN
from convex_caldera.recipes.table import method as method_named
from convex_caldera.workflow.compress import compress_to
from convex_caldera.workflow.evaluating import evaluate_models
from convex_caldera.workflow.settings import make_settings

METHODS = ("rtn", "gptq", "nf4", "quip-sharp", "caldera", "qtip", "convex-caldera")
# model -> (calibration text, evaluation text); paths are below --data.
CASES = {
    "bundled": ("bundled:calibration", "bundled:test"),
    "models/TinyStories-656K": ("text/tinystories_train_2mb.txt", "text/tinystories_valid_a.txt"),
    "models/wiki-llama-14m": ("text/c4_sample_a.txt", "text/wikipedia_en_2018_valid.txt"),
}


def located(name: str, data: Path | None) -> str:
    """A bundled name as it is, anything else below the data folder."""
    return name if name.startswith("bundled") else str((data or Path()) / name)


def run_cell(model: str, method: str, bits: float, text: str, out: Path, args) -> dict:
    """Compress, or take what an earlier run left in the same place; the figures of the file."""
    done = out.with_suffix(".summary.json")
    if done.is_file():
        return json.loads(done.read_text())
    name, _, activations = method.partition("+")
    settings = make_settings(
        model=model,
        method=name,
        bits=bits,
        activations=activations or None,
        dataset=text,
        nsamples=args.nsamples,
        seqlen=args.seqlen,
        allow_short=True,
    )
    kind, menu = method_named(name).curvature, method_named(name).menu
    stem = out.parent / Path(model).name
    summary = compress_to(
        settings,
        out,
        hessians=None if kind == "none" else Path(f"{stem}-{kind}"),
        measured=None if menu is None else Path(f"{stem}-{name}-measured"),
        workers=args.workers,
    ).to_dict()
    kept = ("file_bytes", "bits_per_compressed_weight", "bits_per_weight", "seconds",
            "peak_memory_bytes", "plan_gap", "surrogate_gap", "distortion")  # fmt: skip
    figures = {key: summary[key] for key in kept if key in summary}
    done.write_text(json.dumps(figures))
    return figures


def output(folder: Path, model: str, method: str, bits: float) -> Path:
    """Where a cell is compressed to; no dots, so that a suffix can be put to it."""
    return folder / f"{Path(model).name}-{method.replace('/', '-')}-{round(1000 * bits)}"


def run_budget(name: str, bits: float, args, folder: Path) -> list[dict]:
    """All methods at one budget on one model, evaluated together."""
    calibration, evaluation = (located(text, args.data) for text in CASES[name])
    model = located(name, args.data)
    outs, rows = [], []
    for method in args.methods:
        out = output(folder, name, method, bits)
        row = {"model": Path(name).name, "budget_bits": bits, "method": method}
        row |= {"nsamples": args.nsamples, "seqlen": args.seqlen}
        try:
            row |= run_cell(model, method, bits, calibration, out, args)
        except Exception as error:  # a failed cell is a row of the table
            rows.append(row | {"error": f"{type(error).__name__}: {error}"})
            print(rows[-1], flush=True)
            continue
        outs.append(out)
        rows.append(row)
    result = evaluate_models(
        [model, *map(str, outs)], evaluation, max_tokens=args.max_tokens
    ).to_dict()
    scores = {entry["name"]: entry for entry in result["models"]}
    measured = ("perplexity", "perplexity_stderr", "bits_per_byte", "kl", "kl_stderr",
                "top1_agreement")  # fmt: skip
    for row in rows:
        found = scores.get(str(output(folder, name, row["method"], bits)))
        if found:
            row |= {key: found[key] for key in measured}
            print(json.dumps(row), flush=True)
    original = scores[model]
    head = {"model": Path(name).name, "budget_bits": bits, "method": "original"}
    keys = ("file_bytes", "bits_per_compressed_weight", *measured)
    return [head | {key: original[key] for key in keys}, *rows]


def table(rows: list[dict]) -> str:
    """Markdown, one line per cell."""
    lines = [
        "| model | budget | method | bits/weight | file bytes | perplexity | KL | top-1 | s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        if "error" in r:
            lines.append(f"| {r['model']} | {r['budget_bits']:g} | {r['method']} | {r['error']} |")
            continue
        seconds = f"{r['seconds']:.0f}" if "seconds" in r else ""
        lines.append(
            f"| {r['model']} | {r['budget_bits']:g} | {r['method']} "
            f"| {r['bits_per_compressed_weight']:.3f} | {r['file_bytes']:,} "
            f"| {r['perplexity']:.3f} ± {r['perplexity_stderr']:.3f} "
            f"| {r['kl']:.4f} ± {r.get('kl_stderr') or 0:.4f} "
            f"| {100 * r['top1_agreement']:.2f} % | {seconds} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=None, help="folder with models/ and text/")
    parser.add_argument("--models", nargs="+", default=list(CASES))
    parser.add_argument("--bits", nargs="+", type=float, default=[2.2, 3.2, 4.2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--max-tokens", type=int, default=60_000)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--work", type=Path, default=None, help="folder to keep outputs in")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quality.json"))
    args = parser.parse_args()
    rows = json.loads(args.out.read_text())["rows"] if args.out.is_file() else []
    skipped = []
    folder = args.work or Path(tempfile.mkdtemp(prefix="quality-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for name in args.models:
            if not name.startswith("bundled") and not Path(located(name, args.data)).is_dir():
                skipped.append(name)
                continue
            for bits in args.bits:
                rows = merged(rows, run_budget(name, bits, args, folder))
                save(rows, skipped, args)
    finally:
        if args.work is None:
            shutil.rmtree(folder)
    print(table(rows))


def merged(rows: list[dict], new: list[dict]) -> list[dict]:
    """Rows with new ones in the place of those of the same cells, in order."""
    order = ["original", *KNOWN]

    def place(row: dict) -> tuple:
        name, _, activations = row["method"].partition("+")
        return row["model"], row["budget_bits"], order.index(name), activations

    cells = {place(row): row for row in rows + new}
    return [cells[key] for key in sorted(cells)]


def save(rows: list[dict], skipped: list[str], args) -> None:
    args.out.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "command": f"python benchmarks/quality.py --data DATA --max-tokens {args.max_tokens}"
        f"{' --work DIR' if args.work else ''}, methods, budgets, --nsamples and --seqlen "
        "as in the rows",
        "python": platform.python_version(),
        "max_tokens": args.max_tokens,
        "skipped": skipped,
        "rows": rows,
    }
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(table(rows))


if __name__ == "__main__":
    main()
