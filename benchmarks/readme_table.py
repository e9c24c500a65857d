"""Put the table of benchmarks/results/quality.json between the README's results markers.

python benchmarks/readme_table.py
"""

from __future__ import annotations

import json
from pathlib import Path

START, END = "<!-- results -->", "<!-- end of results -->"
# The page of results has all budgets and methods.
BUDGETS = (2.2, 3.0, 4.0)
ORDER = ("rtn", "nf4", "gptq", "quip-sharp", "caldera", "qtip", "convex-caldera")


def cells(rows: list[dict], method: str, columns: list[tuple[str, float]]) -> list[str]:
    """KL and perplexity of one method at each model and budget; a dash where there is none."""
    out = []
    for model, budget in columns:
        found = [
            r
            for r in rows
            if (r["model"], r["budget_bits"], r["method"]) == (model, budget, method) and "kl" in r
        ]
        out.append(f"{found[0]['kl']:.4f} ({found[0]['perplexity']:.2f})" if found else "-")
    return out


def table(rows: list[dict]) -> str:
    columns = sorted({(r["model"], r["budget_bits"]) for r in rows})
    heads = [f"{model} {budget:g} b" for model, budget in columns]
    lines = ["| KL, nats (perplexity) | " + " | ".join(heads) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    originals = [
        next(f"0 ({r['perplexity']:.2f})" for r in rows
             if (r["model"], r["budget_bits"], r["method"]) == (*column, "original"))
        for column in columns
    ]  # fmt: skip
    lines.append("| original | " + " | ".join(originals) + " |")
    for method in (m for m in ORDER if any(r["method"] == m for r in rows)):
        lines.append(f"| {method} | " + " | ".join(cells(rows, method, columns)) + " |")
    return "\n".join(lines)


def main() -> None:
    rows = json.loads(Path("benchmarks/results/quality.json").read_text())["rows"]
    rows = [row for row in rows if row["budget_bits"] in BUDGETS]
    path = Path("README.md")
    text = path.read_text()
    before, _, rest = text.partition(START)
    _, found, after = rest.partition(END)
    after = after if found else rest
    path.write_text(f"{before}{START}\n{table(rows)}\n{END}{after}")


if __name__ == "__main__":
    main()
