"""Scores as a table: plain aligned text, or a rich table for a terminal.

Cells are strings made once, `score_cells`, so that both forms and every command say the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from convex_caldera.evaluate.compare import ModelScore

if TYPE_CHECKING:
    from rich.table import Table

HEADINGS = (
    "model",
    "file bytes",
    "bits/weight",
    "perplexity",
    "bits/byte",
    "KL per token",
    "top-1 agreement",
)
MISSING = "-"


def score_cells(scores: Sequence[ModelScore]) -> list[tuple[str, ...]]:
    """One row of cells per model, under `HEADINGS`; standard errors follow a ±."""
    return [_cells(score) for score in scores]


def plain_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned text: the first column to the left, the others to the right."""
    lines = [tuple(headings), *(tuple(row) for row in rows)]
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    lines.insert(1, tuple("-" * width for width in widths))
    return "\n".join(_aligned(line, widths) for line in lines)


def rich_table(headings: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> Table:
    """The same for `rich.console.Console.print`."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, box=SIMPLE_HEAD, title_justify="left")
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        # Text, not markup: a model may be called "[b]".
        table.add_row(*(Text(cell) for cell in row))
    return table


def _aligned(line: Sequence[str], widths: Sequence[int]) -> str:
    cells = [line[0].ljust(widths[0])]
    cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
    return "  ".join(cells).rstrip()


def _cells(score: ModelScore) -> tuple[str, ...]:
    bits = score.bits_per_compressed_weight
    return (
        score.name,
        MISSING if score.file_bytes is None else f"{score.file_bytes:,}",
        MISSING if bits is None else f"{bits:.3f}",
        _with_error(score.perplexity, score.perplexity_stderr, 3),
        MISSING if score.bits_per_byte is None else f"{score.bits_per_byte:.4f}",
        _with_error(score.kl, score.kl_stderr, 4),
        _percent(score.top1_agreement, score.top1_stderr),
    )


def _with_error(value: float, stderr: float | None, digits: int) -> str:
    return f"{value:.{digits}f}" + ("" if stderr is None else f" ± {stderr:.{digits}f}")


def _percent(value: float, stderr: float | None) -> str:
    return f"{100 * value:.2f}" + ("" if stderr is None else f" ± {100 * stderr:.2f}") + " %"
