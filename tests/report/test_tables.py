"""All renderings say the same, and none lets a name through as markup."""

from __future__ import annotations

import csv
import html
import io

import pytest

from convex_caldera.report import tables
from convex_caldera.report.tables import RENDERERS, Rows

HOSTILE = "<b>&\"'|`_*[x](y)$\\%#{}~^\n\x00\u202e"


def test_markdown_by_hand():
    rows = Rows(("model", "bits"), (("a|b", "2.00"),))
    assert tables.markdown(rows) == "| model | bits |\n| --- | ---: |\n| a\\|b | 2.00 |\n"


def test_latex_by_hand():
    rows = Rows(("model", "KL ± 1"), (("a_b & 50%", "2"),))
    assert tables.latex(rows) == (
        "\\begin{tabular}{lr}\n\\toprule\nmodel & KL $\\pm$ 1 \\\\\n\\midrule\n"
        "a\\_b \\& 50\\% & 2 \\\\\n\\bottomrule\n\\end{tabular}\n"
    )


def test_plain_text_is_aligned():
    rows = Rows(("model", "bits"), (("a", "2.00"), ("longer", "13.00")))
    assert tables.plain(rows) == "model    bits\n------  -----\na        2.00\nlonger  13.00\n"


def test_csv_reads_back():
    rows = Rows(("model", "bits"), (('a,"b"', "2"), ("c", "3")))
    read = list(csv.reader(io.StringIO(tables.comma_separated(rows))))
    assert read == [["model", "bits"], ['a,"b"', "2"], ["c", "3"]]


@pytest.mark.parametrize("name", RENDERERS)
def test_one_line_per_row_whatever_the_name(name):
    harmless = Rows(("model", "bits"), (("a", "2"), ("b", "3")))
    hostile = Rows(("model", "bits"), ((HOSTILE, "2"), ("b", "3")))
    lines = RENDERERS[name](hostile).splitlines()
    assert len(lines) == len(RENDERERS[name](harmless).splitlines())
    assert not any(c in RENDERERS[name](hostile) for c in "\x00\u202e")


def test_html_escapes_cells_headings_and_caption():
    rows = Rows((HOSTILE, HOSTILE), ((HOSTILE, HOSTILE),))
    text = tables.html_table(rows, "cards", HOSTILE)
    assert "<b>" not in text
    assert text.count(html.escape("<b>&\"'|")) == 6


def test_markdown_lets_no_html_through():
    assert "<b>" not in tables.markdown(Rows(("a",), ((HOSTILE,),)))


def test_empty_columns_are_left_out():
    rows = Rows(("a", "b", "c"), (("x", tables.MISSING, "1"), ("y", tables.MISSING, "2")))
    assert rows.without_empty_columns() == Rows(("a", "c"), (("x", "1"), ("y", "2")))
