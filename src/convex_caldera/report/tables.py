"""One set of rows, five renderings: plain text, Markdown, LaTeX, CSV and HTML.

Cells are strings made once, so that all renderings say the same. Every rendering escapes what
its language would take for markup; names come from files and may hold anything.
"""

from __future__ import annotations

import csv
import html
import io
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

MISSING = "–"

_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "×": r"$\times$",
    "–": "--",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
}


@dataclass(frozen=True)
class Rows:
    """Headings and cells; the first `left` columns are text, the others numbers.

    Attributes:
        headings: one per column.
        cells: rows of as many strings.
        left: columns that are aligned to the left.
        strong: numbers of rows that stand out (the original model).
    """

    headings: tuple[str, ...]
    cells: tuple[tuple[str, ...], ...]
    left: int = 1
    strong: frozenset[int] = frozenset()

    def without_empty_columns(self) -> Rows:
        """Columns that say nothing in any row left out."""
        keep = [
            i
            for i in range(len(self.headings))
            if i < self.left or any(row[i] != MISSING for row in self.cells)
        ]
        cells = tuple(tuple(row[i] for i in keep) for row in self.cells)
        return Rows(tuple(self.headings[i] for i in keep), cells, self.left, self.strong)


def plain(rows: Rows) -> str:
    """Aligned text."""
    lines = [rows.headings, *rows.cells]
    lines = [tuple(one_line(cell) for cell in line) for line in lines]
    widths = [max(len(line[i]) for line in lines) for i in range(len(rows.headings))]
    lines.insert(1, tuple("-" * width for width in widths))

    def aligned(line: Sequence[str]) -> str:
        cells = [
            cell.ljust(width) if i < rows.left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return "\n".join(aligned(line) for line in lines) + "\n"


def markdown(rows: Rows) -> str:
    """A pipe table of GitHub-flavoured Markdown."""
    rule = ["---" if i < rows.left else "---:" for i in range(len(rows.headings))]
    lines = [_escaped(rows.headings, _markdown_cell), rule]
    lines += [_escaped(row, _markdown_cell) for row in rows.cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def latex(rows: Rows) -> str:
    """A tabular with booktabs rules."""
    columns = "".join("l" if i < rows.left else "r" for i in range(len(rows.headings)))
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule"]
    lines.append(" & ".join(_escaped(rows.headings, _latex_cell)) + r" \\")
    lines.append(r"\midrule")
    lines += [" & ".join(_escaped(row, _latex_cell)) + r" \\" for row in rows.cells]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def comma_separated(rows: Rows) -> str:
    """CSV (RFC 4180 quoting, newlines of Unix)."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([one_line(cell) for cell in rows.headings])
    writer.writerows([one_line(cell) for cell in row] for row in rows.cells)
    return out.getvalue()


def html_table(rows: Rows, css_class: str, caption: str) -> str:
    """A table with scoped headings; every cell carries its heading for narrow screens."""
    heads = "".join(
        f'<th scope="col"{_text_class(i, rows.left)}>{_html(text)}</th>'
        for i, text in enumerate(rows.headings)
    )
    body = []
    for number, row in enumerate(rows.cells):
        first = f'<th scope="row">{_html(row[0])}</th>'
        cells = "".join(
            f'<td{_text_class(i, rows.left)} data-label="{_html(rows.headings[i])}">'
            f"{_html(row[i])}</td>"
            for i in range(1, len(row))
        )
        strong = ' class="strong"' if number in rows.strong else ""
        body.append(f"<tr{strong}>{first}{cells}</tr>")
    lines = "\n".join(body)
    return (
        f'<div class="scroll"><table class="{css_class}"><caption>{_html(caption)}</caption>\n'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{lines}\n</tbody></table></div>"
    )


RENDERERS: dict[str, Callable[[Rows], str]] = {
    "txt": plain,
    "md": markdown,
    "tex": latex,
    "csv": comma_separated,
}


def one_line(text: str) -> str:
    """Without control characters, line breaks and invisible direction marks."""
    return "".join(c if unicodedata.category(c)[0] != "C" else " " for c in text)


def _escaped(cells: Sequence[str], escape: Callable[[str], str]) -> list[str]:
    return [escape(one_line(cell)) for cell in cells]


def _markdown_cell(text: str) -> str:
    text = html.escape(text, quote=False)
    return "".join("\\" + c if c in "\\`*_[]|~" else c for c in text)


def _latex_cell(text: str) -> str:
    return "".join(_LATEX.get(c, c) for c in text)


def _html(text: str) -> str:
    return html.escape(one_line(text), quote=True)


def _text_class(column: int, left: int) -> str:
    return ' class="text"' if column < left else ""
