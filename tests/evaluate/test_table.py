from __future__ import annotations

import io

from rich.console import Console

from convex_caldera.evaluate import HEADINGS, ModelScore, plain_table, rich_table, score_cells

SCORES = [
    ModelScore("original", 15_000_000, 16.0, 12.3456, 0.25, 2.345678, 0.0, 0.0, 1.0, 0.0, 10, 2.5),
    ModelScore("[b]mine", None, None, 13.0, None, None, 0.05, None, 0.9, None, 10, 2.6),
]


def test_plain_table_aligns_columns_and_marks_what_is_missing():
    lines = plain_table(HEADINGS, score_cells(SCORES)).splitlines()
    assert lines[0].split() == " ".join(HEADINGS).split()
    assert lines[2].split()[:4] == ["original", "15,000,000", "16.000", "12.346"]
    assert lines[2].endswith("100.00 ± 0.00 %")
    assert lines[3].split() == ["[b]mine", "-", "-", "13.000", "-", "0.0500", "90.00", "%"]
    assert len({len(line) for line in lines}) == 1


def test_rich_table_shows_the_same_cells_and_takes_names_literally():
    console = Console(file=io.StringIO(), width=200)
    console.print(rich_table(HEADINGS, score_cells(SCORES), title="Held-out text"))
    shown = console.file.getvalue()
    for row in score_cells(SCORES):
        for cell in row:
            assert cell in shown
    assert "Held-out text" in shown
