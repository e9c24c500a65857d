"""A compressed directory as a table, one line per layer.

Per weight, "nominal" is the width of the codes, "entropy" their empirical entropy, and "bits"
all that is stored of the layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convex_caldera.evaluate.table import MISSING, plain_table
from convex_caldera.storage.read import Container, open_container
from convex_caldera.storage.spec import Spec

HEADINGS = (
    "layer",
    "shape",
    "terms",
    "nominal",
    "entropy",
    "bits",
    "rank",
    "relative loss",
    "ridge",
    "dead",
    "tokens",
)


@dataclass(frozen=True)
class Inspection:
    """Rows of the per-layer table and the totals, from the files and their report."""

    rows: tuple[dict[str, Any], ...]
    totals: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return {"layers": list(self.rows), **self.totals}

    def text(self) -> str:
        cells = [
            (
                row["name"],
                "x".join(map(str, row["shape"])),
                row["terms"],
                _rate(row["nominal_bits"]),
                _rate(row["entropy_bits"]),
                f"{row['bits']:.3f}",
                str(row["rank"]),
                f"{row['relative_loss']:.5f}",
                f"{row['ridge']:.2e}",
                str(row["dead_channels"]),
                str(row["tokens"]),
            )
            for row in self.rows
        ]
        totals = self.totals
        return (
            f"{plain_table(HEADINGS, cells)}\n\n"
            f"{totals['method']}: {totals['file_bytes']:,} bytes, "
            f"{totals['bits_per_compressed_weight']:.4f} bits per compressed weight, "
            f"{totals['bits_per_weight']:.4f} per all weights"
            + (f", activations {totals['activations']}" if totals["activations"] else "")
            + _saved(totals["lossless_saved_bytes"])
        )


def inspect_directory(directory: Path) -> Inspection:
    """Read the table of a compressed directory; nothing is decoded.

    Raises:
        FormatError: the directory is damaged.
    """
    container = open_container(directory)
    report = container.report()
    sizes = container.sizes()
    rows = tuple(_row(container, name, report["layers"][name]) for name in sorted(container.layers))
    return Inspection(
        rows,
        {
            "method": report["method"],
            "budget_bytes": report["budget_bytes"],
            "file_bytes": sizes.file_bytes,
            "compressed_bytes": sizes.compressed_bytes,
            "bits_per_compressed_weight": sizes.bits_per_compressed_weight,
            "bits_per_weight": sizes.bits_per_weight,
            "activations": container.activations,
            "lossless_saved_bytes": sizes.lossless_saved_bytes,
        },
    )


def _row(container: Container, name: str, record: dict[str, Any]) -> dict[str, Any]:
    _, spec = container.layers[name]
    kept = ("shape", "bits", "rank", "loss", "relative_loss", "ridge", "dead_channels", "tokens")
    rates = {key: record.get(key) for key in ("nominal_bits", "entropy_bits")}  # since 0.1
    return {"name": name, "terms": _terms(spec), **rates, **{key: record[key] for key in kept}}


def _saved(num_bytes: int) -> str:
    return f", {num_bytes:,} bytes saved on kept tensors" if num_bytes else ""


def _rate(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3f}"


def _terms(spec: Spec) -> str:
    """Such as "hadamard: e8p 2 + LR(e8p 4)"."""
    inner = " + ".join(_term(term) for term in spec["terms"])
    outer = ", ".join(item["transform"]["kind"] for item in spec["transforms"])
    return f"{outer}: {inner}" if outer else inner


def _term(term: Spec) -> str:
    if term["kind"] == "coded":
        return _quantizer(term)
    sides = {_quantizer(term[s]) if term[s]["kind"] == "coded" else "16" for s in ("left", "right")}
    return f"LR({', '.join(sorted(sides))})"


def _quantizer(term: Spec) -> str:
    record = term["quantizer"]
    coder = f" {term['coder']['kind']}" if "coder" in term else ""
    return f"{record['kind']} {record.get('bits', '')}".strip() + coder
