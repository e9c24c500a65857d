"""docs/results.md from the JSON of the benchmarks, the papers' figures in columns of their own.

    python benchmarks/results_page.py [--check]

Nothing is typed by hand: measured figures come from benchmarks/results/*.json, printed ones from
benchmarks/published.py. `--check` only says whether the page is up to date.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import published
from zero_shot_cells import difference, score_rows

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent.parent / "docs" / "results.md"


def main() -> int:
    text = page()
    if "--check" in sys.argv[1:]:
        return int(not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text)
    PAGE.write_text(text, encoding="utf-8")
    return 0


def page() -> str:
    """The whole page."""
    parts = [
        "# Results",
        "Made by `python benchmarks/results_page.py` from `benchmarks/results/*.json`; each "
        "section names the command that measured it. Bits count every byte of the compressed "
        "files, headers included, over the weights they hold.",
        *quality(read("quality")),
        *zero_shot(read("zero_shot")),
        *recipes(read("recipes")),
        "## Other measurements",
        "\n".join(f"* [{path.stem}](../benchmarks/results/{path.name})" for path in others()),
    ]
    return "\n\n".join(parts) + "\n"


def quality(record: dict[str, Any] | None) -> list[str]:
    """Small models measured here, large ones printed elsewhere."""
    if record is None:
        return []
    parts = ["## Perplexity and KL at equal bytes"]
    parts.append(
        f"Measured by `{record['command']}`: windows of 512 tokens, each beginning with BOS, no "
        "fine-tuning. The last columns are WikiText-2 perplexities of **Llama-2-7B** printed in "
        "the papers: another model, another text, a window of 4096 or 2048 tokens, with or without "
        "fine-tuning. They show what order the methods have there, and compare with nothing on the "
        "left. Sources are in `benchmarks/published.py`. Rows with a format of activations round "
        "them in the forward pass too (the A8 or A6 of W4A8), which costs no byte of the file."
    )
    for budget in sorted({row["budget_bits"] for row in record["rows"]}):
        rows = [row for row in record["rows"] if row["budget_bits"] == budget]
        models = list(dict.fromkeys(row["model"] for row in rows))
        heads = ["method", "bits"]
        heads += [f"{model}: {what}" for model in models for what in ("KL, nats", "perplexity")]
        heads += [
            f"Llama-2-7B, ctx {context}, {'fine-tuned' if tuned else 'not fine-tuned'} (papers)"
            for context, tuned in published.COLUMNS
        ]
        table = []
        for method in dict.fromkeys(row["method"] for row in rows):
            found = {row["model"]: row for row in rows if row["method"] == method}
            table.append(quality_row(method, budget, models, found))
        parts += [f"### {budget:g} bits", markdown(heads, table)]
    return parts


def quality_row(
    method: str, budget: float, models: list[str], found: dict[str, dict[str, Any]]
) -> list[str]:
    bits = {round(row["bits_per_compressed_weight"], 3) for row in found.values() if "kl" in row}
    spread = [f"{end:.3f}" for end in sorted({min(bits), max(bits)})] if bits else ["-"]
    name, _, activations = method.partition("+")
    cells = [f"{name}, activations {activations}" if activations else name, " to ".join(spread)]
    for model in models:
        row = found.get(model, {})
        if "kl" not in row:
            infeasible = row.get("error", "").startswith("InfeasibleBudgetError")
            cells += ["infeasible" if infeasible else "-", "-"]
        else:
            cells += [f"{row['kl']:.4f} ± {row['kl_stderr']:.4f}"]
            cells += [f"{row['perplexity']:.2f} ± {row['perplexity_stderr']:.2f}"]
    return cells + [published.cell(method, budget, *column) for column in published.COLUMNS]


def zero_shot(record: dict[str, Any] | None) -> list[str]:
    """Accuracies, and where they begin to tell models apart."""
    if record is None:
        return []
    parts = ["## Zero-shot tasks: where differences begin to be significant"]
    limits = ", ".join(f"{key} {value}" for key, value in record["limit"].items())
    parts.append(
        f"{record['model']}, zero-shot through lm-evaluation-harness, items: {limits}; measured by "
        f"`{record['command']}`. Differences are paired (the same items), intervals are 95 % of a "
        "bootstrap over items. The last column is the least number of items, of those tried, from "
        "which on the difference in BLiMP stays significant. With `--work DIR` the models are "
        "those that `quality.py --work DIR` left there."
    )
    heads = ["model", "bits", "KL, nats", "BLiMP acc, %", "LAMBADA acc, %", "LAMBADA ppl"]
    parts.append(markdown(heads, score_rows(record, ".4g")))
    pairs = [
        [
            f"{pair['a']} - {pair['b']}",
            difference(pair["blimp acc"], 100, "+.2f"),
            difference(pair["lambada acc"], 100, "+.2f"),
            difference(pair["lambada perplexity"], 1, "+.3f"),
            str(pair["blimp acc"]["significant_from_items"] or "-"),
        ]
        for pair in [*record["with_original"], *record["between_methods"]]
    ]
    heads = ["pair", "BLiMP, points", "LAMBADA, points", "LAMBADA, nats of the last word", "items"]
    return [*parts, markdown(heads, pairs), "A star marks an interval without zero."]


def recipes(record: dict[str, Any] | None) -> list[str]:
    """Commands for large models, with what `plan` predicts."""
    if record is None:
        return []
    layer = record["layer"]
    parts = ["## Recipes for Llama models"]
    parts.append(
        "Not measured here. File sizes are exact and memory is predicted, both by `convex-caldera "
        f"plan`; hours of fitting are scaled from one {layer['size']} x {layer['size']} matrix "
        f"through CALDERA on {layer['threads']} CPU threads, for other methods by their seconds "
        "beside CALDERA's on the small models: an order of magnitude. Calibration "
        f"({record['nsamples']} windows of {record['seqlen']} tokens) comes on top. On a "
        "machine with a GPU add `--device cuda`."
    )
    heads = ["model", "method", "bits per compressed weight", "per all weights", "files, GB",
             "original, GB", "peak memory, GB", "fitting, hours"]  # fmt: skip
    rows = [
        [
            row["model"],
            row["method"],
            f"{row['bits_per_compressed_weight']:.3f}",
            f"{row['bits_per_weight']:.3f}",
            f"{row['file_bytes'] / 1e9:.2f}",
            f"{row['original_bytes'] / 1e9:.2f}",
            f"{row['peak_memory_bytes'] / 1e9:.1f}",
            f"{row['fit_hours']:.0f}",
        ]
        for row in record["rows"]
    ]
    commands = "\n".join(f"    {row['command']}" for row in record["rows"])
    return [*parts, markdown(heads, rows), commands]


def others() -> list[Path]:
    """Pages of further benchmarks."""
    shown = ("quality", "zero_shot")
    return [path for path in sorted(RESULTS.glob("*.md")) if path.stem not in shown]


def read(name: str) -> dict[str, Any] | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(heads) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [heads, rule, *rows])


if __name__ == "__main__":
    sys.exit(main())
