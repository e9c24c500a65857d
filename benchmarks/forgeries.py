"""Seeded forgeries of compressed outputs, and how many the independent checker lets pass.

    python -m benchmarks.forgeries [--count 500] [--honest 50] [--seed 0]
                                   [--real OUT MODEL STATISTICS] [--out benchmarks/results]

Each forgery copies an honest output, falsifies one thing, and repairs what an attacker would:
sums that depend on it, sizes in headers and index, and the manifest's hashes. The checker is
given the model and the statistics only for those that nothing else could show (altered codes,
swapped layers, lowered losses, programs that were not solved so well, another model). Outputs
are small and made on the spot; --real adds one that `convex-caldera compress` wrote. Writes
forgeries.json and forgeries.txt.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.forging.claims import CLAIMS
from benchmarks.forging.contents import CONTENTS
from benchmarks.forging.forger import Forger
from convex_caldera.certify import verify


class Honest(NamedTuple):
    """An honest output, its model and its statistics."""

    output: Path
    model: Path
    statistics: Path


class Outcome(NamedTuple):
    """Kind of a forgery, whether it was rejected, and the last claim that was looked at."""

    kind: str
    rejected: bool
    claim: str


def honest_outputs(count: int, folder: Path) -> list[Honest]:
    """Small outputs made on the spot: one to three blocks, every other one with ties."""
    from tests.certify.making import make

    made = [
        make(folder / f"honest-{seed}", seed, blocks=1 + seed % 3, tied=seed % 2 == 0)
        for seed in range(count)
    ]
    return [Honest(one.output, one.model, one.hessians) for one in made]


def forge(honest: Honest, number: int, seed: int, folder: Path) -> Outcome:
    """Forgery `number` of an honest output, in a folder that is removed again."""
    draw = random.Random(1_000_003 * seed + number)
    kinds = CLAIMS + CONTENTS
    kind = kinds[number % len(kinds)]
    output, model = folder / "out", folder / "model"
    shutil.copytree(honest.output, output)
    shutil.copytree(honest.model, model)
    for path in [output, model, *output.rglob("*"), *model.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    forger = Forger(output, model, draw)
    kind(forger)
    forger.finish()
    evidence = (model, honest.statistics) if kind in CONTENTS else (None, None)
    found = verify(output, *evidence)
    shutil.rmtree(folder)
    last = found.claims[-1]
    return Outcome(kind.__name__, not found.ok, f"{last.name}: {last.value}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--honest", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--real", nargs=3, type=Path, metavar=("OUT", "MODEL", "STATISTICS"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, started = Path(name), time.monotonic()
        bases = honest_outputs(args.honest, folder)
        checked = [*bases, Honest(*args.real)] if args.real else bases
        accepted = sum(verify(*one).ok for one in checked)
        if args.real:
            bases = [checked[-1] if i % 5 == 0 else base for i, base in enumerate(bases)]
        outcomes = [
            forge(bases[i % len(bases)], i, args.seed, folder / "forged") for i in range(args.count)
        ]
        seconds = time.monotonic() - started
    command = f"--count {args.count} --honest {args.honest} --seed {args.seed}"
    table = table_of(outcomes, len(checked), accepted)
    passed = [(i, o.kind, o.claim) for i, o in enumerate(outcomes) if not o.rejected]
    print(table, *passed, f"{seconds:.0f} s", sep="\n")
    record = {
        "command": f"python -m benchmarks.forgeries {command}",
        **counts_of(outcomes),
        "honest": len(checked),
        "accepted": accepted,
        "passed": passed,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "forgeries.json").write_text(json.dumps(record, indent=1) + os.linesep)
    (args.out / "forgeries.txt").write_text(table + os.linesep)


def counts_of(outcomes: list[Outcome]) -> dict[str, Any]:
    """Forged and rejected, by kind and in all."""
    forged = Counter(one.kind for one in outcomes)
    rejected = Counter(one.kind for one in outcomes if one.rejected)
    return {
        "kinds": {kind: {"forged": forged[kind], "rejected": rejected[kind]} for kind in forged},
        "forged": len(outcomes),
        "rejected": rejected.total(),
    }


def table_of(outcomes: list[Outcome], honest: int, accepted: int) -> str:
    """A line for each kind, one for all, one for the honest outputs."""
    counts = counts_of(outcomes)
    rows = {**counts["kinds"], "all": counts}
    return "\n".join(
        [
            f"{'kind':20s} forged rejected",
            *(f"{kind:20s} {row['forged']:6d} {row['rejected']:8d}" for kind, row in rows.items()),
            f"honest outputs: {honest} checked, {accepted} accepted",
        ]
    )


if __name__ == "__main__":
    main()
