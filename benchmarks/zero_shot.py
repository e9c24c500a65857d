"""Where zero-shot differences become significant: BLiMP and LAMBADA on small compressed models.

    python benchmarks/zero_shot.py --data DATA [--model NAME] [--methods rtn,gptq] [--bits 2.2,3]
                                   [--work DIR]

Compresses a model by several methods at several sizes, scores all on the same items and compares
them in pairs (bootstrap over items, inside each of BLiMP's paradigms):

* each compressed model with the original: the size below which the loss is significant;
* methods with each other at one size: which differences the items can tell;
* the least number of items from which on a difference stays significant, by cutting the items to
  a half, a quarter, ... (the first ones of every paradigm).

    python benchmarks/zero_shot.py --data DATA --six

times instead the evaluation of the bundled model on six tasks, 200 items each.

DATA holds models/, tasks/ and text/. With --work, compressed models and finished scores stay there:
a run that was cut short goes on, and outputs of `quality.py --work` in the same folder are taken as
they are. Writes results/zero_shot.json and results/zero_shot.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from zero_shot_cells import difference, score_rows

from convex_caldera.evaluate.bootstrap import paired_bootstrap
from convex_caldera.evaluate.table import plain_table
from convex_caldera.recipes.table import method as method_named
from convex_caldera.workflow.compress import compress_to
from convex_caldera.workflow.progress import Lines
from convex_caldera.workflow.settings import make_settings
from convex_caldera.workflow.zero_shot import TaskOptions, evaluate_tasks

RESULTS = Path(__file__).parent / "results"
TASKS = ("blimp", "lambada")
SIX = ("piqa", "rte", "winogrande", "arc_easy", "arc_challenge", "boolq")
# Nats of the last word of LAMBADA separate models long before its accuracy does.
FIGURES = (("blimp", "acc"), ("lambada", "acc"), ("lambada", "perplexity"))
# Calibration and held-out text of each model, below DATA/text.
TEXTS = {
    "wiki-llama-14m": ("c4_sample_a.txt", "wikipedia_en_2018_valid.txt"),
    "TinyStories-656K": ("tinystories_train_2mb.txt", "tinystories_valid_a.txt"),
}
WINDOW = 512
SHARES = (1.0, 0.5, 0.25, 0.125, 0.0625)


def main() -> None:
    options = parsed()
    path = RESULTS / "zero_shot.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    if options.six:
        record = before | {"six_tasks": timed(options)}
    else:
        with tempfile.TemporaryDirectory() as folder:
            record = before | measured(options, options.work or Path(folder))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "zero_shot.json").write_text(json.dumps(record, indent=1) + "\n")
    (RESULTS / "zero_shot.md").write_text(page(record))
    print(page(record))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="wiki-llama-14m", choices=TEXTS)
    parser.add_argument("--methods", default="rtn,gptq,qtip")
    parser.add_argument("--bits", default="2.2,3,4")
    parser.add_argument("--limit", type=int, default=25, help="items per paradigm of BLiMP")
    parser.add_argument("--lambada", type=int, default=500, help="items of LAMBADA")
    parser.add_argument("--tokens", type=int, default=8192, help="of held-out text, for KL")
    parser.add_argument("--work", type=Path, help="where outputs and finished scores stay")
    parser.add_argument("--six", action="store_true", help="time six tasks instead")
    return parser.parse_args()


def timed(options: argparse.Namespace) -> dict[str, Any]:
    """What `eval bundled` takes for six tasks, KL text and all."""
    wanted = TaskOptions(
        SIX, (str(options.data / "tasks"),), 200, max_tokens=options.tokens, window=WINDOW
    )
    started, cpu = time.monotonic(), time.process_time()
    evaluate_tasks(["bundled"], wanted, progress=Lines())
    return {
        "tasks": list(SIX),
        "limit": 200,
        "threads": torch.get_num_threads(),
        "seconds": time.monotonic() - started,
        "cpu_seconds": time.process_time() - cpu,
        "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


def measured(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Scores with their items, and every paired comparison."""
    model = str(options.data / "models" / options.model)
    calibration, held_out = (str(options.data / "text" / name) for name in TEXTS[options.model])
    names = {"original": model}
    for bits, method in itertools.product(options.bits.split(","), options.methods.split(",")):
        names[f"{method} {bits}"] = compressed(model, method, float(bits), calibration, folder)
    items: dict[str, dict[str, Any]] = {name: {} for name in names}
    scores: dict[str, Any] = {name: {} for name in names}
    for task, limit in zip(TASKS, (options.limit, options.lambada), strict=True):
        # KL is taken once, with the first task; the least that `eval` does comes with the others.
        tokens = options.tokens if task == TASKS[0] else WINDOW
        wanted = TaskOptions(
            (task,), (str(options.data / "tasks"),), limit, max_tokens=tokens, text=held_out,
            window=WINDOW,
        )  # fmt: skip
        kept = folder / task
        record = evaluate_tasks(list(names.values()), wanted, output_dir=kept, progress=Lines())
        label = {path: name for name, path in names.items()}
        for entry in record["models"]:
            scores[label[entry["name"]]] = summary(entry, task) | scores[label[entry["name"]]]
        for part in kept_parts(kept / "parts", task, limit):
            items[label[part["model"]]][task] = part["record"]
    return {
        "model": options.model,
        "limit": {"blimp per paradigm": options.limit, "lambada": options.lambada},
        "models": scores,
        "with_original": [compared(items, name, "original") for name in list(names)[1:]],
        "between_methods": [
            compared(items, f"{a} {bits}", f"{b} {bits}")
            for bits in options.bits.split(",")
            for a, b in itertools.combinations(options.methods.split(","), 2)
        ],
        "command": f"python benchmarks/zero_shot.py --data DATA --model {options.model} "
        f"--methods {options.methods} --bits {options.bits} --limit {options.limit} "
        f"--tokens {options.tokens} "
        f"--lambada {options.lambada}" + (" --work DIR" if options.work else ""),
    }


def kept_parts(folder: Path, task: str, limit: int) -> list[dict[str, Any]]:
    """Finished scores of a task by rising number of items; those of a higher limit are left out."""
    parts = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    found = [part for part in parts if part["part"] == task]
    groups = [part["record"]["parts"] for part in found]
    fitting = [p for p, g in zip(found, groups, strict=True) if len(g) <= limit * len(set(g))]
    return sorted(fitting, key=lambda part: len(part["record"]["parts"]))


def compressed(model: str, method: str, bits: float, text: str, folder: Path) -> str:
    """The output of one cell, made unless it is there; those of one curvature share statistics."""
    name = Path(model).name
    out = folder / f"{name}-{method}-{round(1000 * bits)}"
    if not (out / "config.json").is_file():
        settings = make_settings(
            model=model, method=method, bits=bits, dataset=text, nsamples=64, seqlen=256
        )
        kind = method_named(method).curvature
        kept = None if kind == "none" else folder / f"{name}-{kind}-64"
        compress_to(settings, out, progress=Lines(), hessians=kept)
    return str(out)


def summary(entry: dict[str, Any], task: str) -> dict[str, Any]:
    keys = ("bits_per_compressed_weight", "kl", "kl_stderr", "top1_agreement")
    return {**{key: entry[key] for key in keys}, task: entry["tasks"][task]}


def compared(items: dict[str, dict[str, Any]], a: str, b: str) -> dict[str, Any]:
    """The paired difference a - b in every figure, and from how many items on it is sure."""
    found: dict[str, Any] = {"a": a, "b": b}
    for task, metric in FIGURES:
        first, second = items[a][task], items[b][task]
        pairs = {}
        for share in SHARES:
            rows = first_items(first["parts"], share)
            x, y = ([record["items"][metric][i] for i in rows] for record in (first, second))
            pairs[len(rows)] = paired_bootstrap(x, y, [first["parts"][i] for i in rows])
        sure = []
        for count, pair in pairs.items():  # from all items down, as long as it stays significant
            if not pair.significant:
                break
            sure.append(count)
        found[f"{task} {metric}"] = {
            **pairs[max(pairs)].to_dict(),
            "significant_from_items": min(sure) if sure else None,
        }
    return found


def first_items(parts: list[str], share: float) -> list[int]:
    """The first `share` of the items of every part, at least two."""
    seen: dict[str, list[int]] = {}
    for index, part in enumerate(parts):
        seen.setdefault(part, []).append(index)
    return sorted(i for rows in seen.values() for i in rows[: max(2, round(share * len(rows)))])


def page(record: dict[str, Any]) -> str:
    """The figures as Markdown with two fixed-width tables."""
    headings = ("model", "bits", "KL", "BLiMP, %", "LAMBADA, %", "LAMBADA ppl")
    lines = [f"# Zero-shot scores of {record['model']}", "", "```"]
    lines += [plain_table(headings, score_rows(record, ".1f")), "```", ""]
    lines += ["## Paired differences, a - b", ""]
    lines += ["`*` marks a 95 % interval without zero; then the least number of items for it.", ""]
    pairs = [
        (f"{c['a']} - {c['b']}", *(cell(c[f"{t} {m}"], m) for t, m in FIGURES))
        for c in [*record["with_original"], *record["between_methods"]]
    ]
    titles = ("pair", "BLiMP, points", "LAMBADA, points", "LAMBADA, nats of the last word")
    lines += ["```", plain_table(titles, pairs), "```", ""]
    six = record.get("six_tasks")
    if six is not None:
        lines += [
            f"The bundled model on {', '.join(six['tasks'])}, {six['limit']} items each, with KL "
            f"text: {six['cpu_seconds']:.0f} CPU seconds on {six['threads']} thread(s), peak "
            f"{six['peak_bytes'] / 1e6:.0f} MB.",
            "",
        ]
    return "\n".join(lines)


def cell(pair: dict[str, Any], metric: str) -> str:
    scale, form = (1.0, "+.3f") if metric == "perplexity" else (100.0, "+.2f")
    items = f" {pair['significant_from_items']}" if pair["significant"] else ""
    return difference(pair, scale, form) + items


if __name__ == "__main__":
    main()
