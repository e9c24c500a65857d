"""Files with compressed embeddings beside files with embeddings as they were: KL by file bytes.

    python benchmarks/embeddings.py [--data DIR] [--models bundled ...] [--bits 2.2]
                                    [--embeddings 3 4] [--work DIR]
                                    [--out benchmarks/results/embeddings.json]

Each file is one `convex-caldera compress --bits B`, with --embeddings for the budgets given there,
reloaded from disk; all files of a model are evaluated on the same tokens in one run, the original
first. Texts are those of quality.py. Writes the JSON, and a table beside it. With --work, outputs
stay there and a run that was cut short goes on where it was; models that are not asked for keep
their rows.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from quality import CASES, located

from convex_caldera.workflow.compress import compress_to
from convex_caldera.workflow.evaluating import evaluate_models
from convex_caldera.workflow.settings import make_settings

KEPT = ("file_bytes", "compressed_bytes", "bits_per_compressed_weight", "bits_per_weight")


def run_file(model: str, text: str, bits: float, embeddings: bool, out: Path, args) -> dict:
    """Compress, or take what an earlier run left in the same place; the figures of the file."""
    done = out.with_suffix(".json")
    if not done.is_file():
        settings = make_settings(
            model=model,
            bits=bits,
            embeddings=embeddings,
            dataset=text,
            nsamples=args.nsamples,
            seqlen=args.seqlen,
            allow_short=True,
        )
        statistics = out.parent / f"{Path(model).name}-statistics"
        summary = compress_to(settings, out, hessians=statistics, workers=args.workers)
        done.write_text(json.dumps(summary.to_dict()))
    found = json.loads(done.read_text())
    figures = {key: found[key] for key in (*KEPT, "distortion") if key in found}
    return {"bits": bits, "embeddings": embeddings, **figures}


def run_model(name: str, args, folder: Path) -> list[dict]:
    """All files of one model, evaluated together."""
    calibration, evaluation = (located(text, args.data) for text in CASES[name])
    model = located(name, args.data)
    cells = [(bits, False) for bits in args.bits] + [(bits, True) for bits in args.embeddings]
    outs, rows = [], []
    for bits, embeddings in cells:
        kind = "with" if embeddings else "without"
        outs.append(folder / f"{Path(name).name}-{kind}-{round(1000 * bits)}")
        rows.append(run_file(model, calibration, bits, embeddings, outs[-1], args))
    found = evaluate_models(
        [model, *map(str, outs)], evaluation, window=args.window, max_tokens=args.max_tokens
    ).evaluation
    for row, score in zip(rows, list(found)[1:], strict=True):
        row |= {"model": Path(name).name, "kl": score.kl, "kl_stderr": score.kl_stderr}
        row |= {"perplexity": score.perplexity, "original": found[0].perplexity}
    return rows


def table(record: dict) -> str:
    """The rows by model and falling size."""
    lines = [
        f"`{record['command']}`, calibrated on {record['nsamples']} windows of {record['seqlen']}, "
        f"evaluated on {record['max_tokens']} tokens.",
        "",
        "| model | embeddings | `--bits` | file bytes | KL, nats | perplexity (original) |",
        "|---|---|---|---|---|---|",
    ]
    for row in sorted(record["rows"], key=lambda row: (row["model"], -row["file_bytes"])):
        kind = "compressed" if row["embeddings"] else "as they were"
        lines.append(
            f"| {row['model']} | {kind} | {row['bits']:g} | {row['file_bytes']:,} | "
            f"{row['kl']:.4f} | {row['perplexity']:.2f} ({row['original']:.2f}) |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--models", nargs="+", default=["bundled"], choices=list(CASES))
    parser.add_argument("--bits", nargs="*", type=float, default=[2.2])
    parser.add_argument("--embeddings", nargs="*", type=float, default=[3.0, 4.0])
    parser.add_argument("--nsamples", type=int, default=192)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=30000)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/embeddings.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        rows = [row for name in args.models for row in run_model(name, args, folder)]
    made = {row["model"] for row in rows}
    old = json.loads(args.out.read_text())["rows"] if args.out.is_file() else []
    record = {
        "command": "python benchmarks/embeddings.py --data DATA",
        "nsamples": args.nsamples,
        "seqlen": args.seqlen,
        "max_tokens": args.max_tokens,
        "rows": [row for row in old if row["model"] not in made] + rows,
    }
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(table(record))


if __name__ == "__main__":
    main()
