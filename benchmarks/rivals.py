"""convex-caldera on wiki-llama-14m at the stored bits of other libraries' outputs.

    python benchmarks/rivals.py --data DIR [--keep FOLDER] [--ways ...] [--cells 2.14 ...]
                                [--peer-python PYTHON --peers rtn auto-round]
                                [--out benchmarks/results/rivals.json]

The rivals' figures are those of DATA/SOURCES.md, measured there by DATA/../tools/peers_ppl.py with
their own libraries: calibration on c4_sample_a, 400 windows of 512 tokens of a Wikipedia text that
is not in DATA, no BOS, groups of 128, scales and zero points counted. Here the text is
wikipedia_en_2018_valid, otherwise the protocol is the same; KL is against each run's own original.
With --peer-python, an interpreter that has the rivals, the same tool measures them on this text and
machine too, one after the other with convex-caldera. Outputs under --keep that are there already
are evaluated again, not made again. Ways, cells and peers not asked for keep their rows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

from convex_caldera.workflow.compress import compress_to
from convex_caldera.workflow.evaluating import evaluate_models
from convex_caldera.workflow.settings import make_settings

MODEL, TEXT = "models/wiki-llama-14m", "text/wikipedia_en_2018_valid.txt"
CALIBRATION = "text/c4_sample_a.txt"
# stored bits -> library -> (KL, seconds where measured)
RIVALS: dict[float, dict[str, tuple[float, float | None]]] = {
    2.14: {
        "round to nearest": (0.2489, None),
        "GPTQ (llm-compressor 0.14)": (0.0801, 55.0),
        "AutoRound 0.16": (0.0627, 195.0),
    },
    3.15: {"round to nearest": (0.0483, None), "GPTQ (llm-compressor 0.14)": (0.0147, None)},
    4.16: {
        "round to nearest": (0.0115, None),
        "AutoRound 0.16": (0.0077, None),
        "GPTQ (llm-compressor 0.14)": (0.0034, None),
    },
}

PEERS = {
    "round to nearest": "rtn",
    "GPTQ (llm-compressor 0.14)": "gptq",
    "AutoRound 0.16": "auto-round",
}
GROUP = "128"

# What convex-caldera is run with: as it comes, and with each layer fitted once.
WAYS: dict[str, dict[str, str]] = {
    "convex-caldera": {},
    "convex-caldera, original targets": {"targets": "original", "shrinkage": "none"},
}


def compressed(way: str, bits: float, data: Path, folder: Path) -> tuple[Path, dict]:
    """The output of one way at a budget, and its summary, made unless it is there."""
    out = folder / f"{list(WAYS).index(way)}-{round(100 * bits)}"
    summary = out.with_suffix(".json")
    if not summary.is_file():
        settings = make_settings(
            model=str(data / MODEL), bits=bits, dataset=str(data / CALIBRATION), **WAYS[way]
        )
        summary.write_text(json.dumps(compress_to(settings, out).to_dict()))
    return out, json.loads(summary.read_text())


def peer_cell(peer: str, bits: float, python: str, data: Path) -> dict:
    """KL and seconds of a rival on this text and machine, by the data's own tool."""
    tool = data.parent / "tools" / "peers_ppl.py"
    command = [python, tool, peer, data / MODEL, data / CALIBRATION, data / TEXT, int(bits), GROUP]
    ran = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True)
    found = json.loads(ran.stdout.strip().splitlines()[-1])
    return {"peer": peer, "bits": bits, **{key: found[key] for key in ("stored", "kl", "seconds")}}


def table(rows: list[dict], peers: list[dict]) -> str:
    lines = [
        "| stored bits | method | KL, nats, on the text of SOURCES | KL here | of the best rival "
        "| s there | s here |",
        "|---|---|---|---|---|---|---|",
    ]
    here = {(cell["bits"], cell["peer"]): cell for cell in peers}
    for bits, rivals in RIVALS.items():
        best = min(kl for kl, _ in rivals.values())
        for name, (kl, seconds) in rivals.items():
            took = f"{seconds:.0f}" if seconds else ""
            again = here.get((bits, PEERS[name]))
            found = f"{again['kl']:.4f}" if again else ""
            now = f"{again['seconds']:.0f}" if again else ""
            share = f"{kl / best:.2f}"
            lines.append(f"| {bits} | {name} | {kl:.4f} | {found} | {share} | {took} | {now} |")
        lines += [
            f"| {bits} | **{row['way']}** ({row['stored_bits']:.3f}) | | {row['kl']:.5f} "
            f"| {row['kl'] / best:.3f} | | {row['seconds']:.0f} |"
            for row in rows
            if row["bits"] == bits
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--keep", type=Path, default=None)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--cells", nargs="+", type=float, default=list(RIVALS))
    parser.add_argument("--peer-python", default=None, help="an interpreter that has the rivals")
    parser.add_argument("--peers", nargs="+", default=["rtn", "auto-round"])
    parser.add_argument("--max-tokens", type=int, default=204_800)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/rivals.json"))
    args = parser.parse_args()
    cells = [(way, bits) for bits in args.cells for way in args.ways]
    measured = [] if args.peer_python is None else [
        peer_cell(peer, bits, args.peer_python, args.data)
        for bits in args.cells for peer in args.peers
    ]  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="rivals-") as scratch:
        folder = args.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        found = [compressed(way, bits, args.data, folder) for way, bits in cells]
        result = evaluate_models(
            [str(args.data / MODEL), *(str(out) for out, _ in found)], str(args.data / TEXT),
            bos=False, max_tokens=args.max_tokens,
        ).to_dict()  # fmt: skip
    original, *scores = result["models"]
    kept = json.loads(args.out.read_text()) if args.out.is_file() else {}
    rows = [row for row in kept.get("rows", []) if (row["way"], row["bits"]) not in cells]
    rows += [
        {"way": way, "bits": bits, "stored_bits": score["bits_per_compressed_weight"],
         "kl": score["kl"], "perplexity": score["perplexity"], "predicted": summary["distortion"],
         "held_out_kl": summary["held_out_kl"], "seconds": summary["seconds"]}
        for (way, bits), (_, summary), score in zip(cells, found, scores, strict=True)
    ]  # fmt: skip
    rows.sort(key=lambda row: (row["bits"], list(WAYS).index(row["way"])))
    new = {(cell["peer"], cell["bits"]) for cell in measured}
    peers = [c for c in kept.get("rivals", []) if (c["peer"], c["bits"]) not in new] + measured
    record = {"original_perplexity": original["perplexity"], "rows": rows, "rivals": peers}
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(table(rows, peers))
    print(table(rows, peers))


if __name__ == "__main__":
    main()
