"""A report in a folder: report.html, every figure as PNG and SVG, and the table in four forms."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from convex_caldera.errors import DataError
from convex_caldera.report.page import Drawn, page
from convex_caldera.report.pictures import Picture, comparison_pictures, run_pictures
from convex_caldera.report.plots.canvas import save, style
from convex_caldera.report.read import read_inputs
from convex_caldera.report.rows import headline
from convex_caldera.report.run import Run
from convex_caldera.report.tables import RENDERERS
from convex_caldera.storage.files import write_atomically

PAGE = "report.html"


def write_report(outs: list[Path], target: Path, evaluations: Iterable[Path] = ()) -> list[Path]:
    """Write one page over one or several output directories, with its figures beside it.

    Args:
        outs: output directories of `compress`, in the order they are shown.
        target: a folder; files of an earlier report in it are replaced.
        evaluations: JSON files of `convex-caldera eval`, one per text; also spectra and
            landscapes (see `read`), which belong to the first directory.

    Returns:
        The files written: report.html, results.{txt,md,tex,csv}, and *.png and *.svg.

    Raises:
        DataError: no directory is given.
        FormatError: a directory or file is malformed; the message names file and key.
        RecipeError: matplotlib is not installed.

    Cost: about half a second per figure; files are read once, no tensor is decoded.
    """
    if not outs:
        raise DataError("a report needs at least one output directory of `compress`")
    with style():  # fails now, not after the reading, if matplotlib is missing
        pass
    target = Path(target)
    runs, scores = read_inputs([Path(out) for out in outs], [Path(path) for path in evaluations])
    runs = _distinct_titles(runs)
    written: list[Path] = []

    def drawn(pictures: Iterable[Picture], prefix: str = "") -> list[Drawn]:
        return [_draw(picture, target, prefix, written) for picture in pictures]

    comparison = drawn(comparison_pictures(runs, scores))
    own = [
        drawn(run_pictures(run), f"{_slug(run.title, i)}-" if len(runs) > 1 else "")
        for i, run in enumerate(runs, start=1)
    ]
    rows = headline(runs, scores)
    texts = {PAGE: page(runs, scores, comparison, own)}
    texts |= {f"results.{suffix}": render(rows) for suffix, render in RENDERERS.items()}
    for name, text in texts.items():
        write_atomically(target / name, [text.encode()])
    return [target / name for name in texts] + written


def _draw(picture: Picture, target: Path, prefix: str, written: list[Path]) -> Drawn:
    svg, png = (target / f"{prefix}{picture.name}.{suffix}" for suffix in ("svg", "png"))
    written += save(picture.draw(), svg, png)
    return Drawn(picture, svg.read_bytes())


def _distinct_titles(runs: Sequence[Run]) -> list[Run]:
    """Folders of one name are told apart by their parent's, then by number."""
    titles = [run.title for run in runs]
    longer = [
        run.title
        if titles.count(run.title) == 1
        else f"{run.directory.resolve().parent.name}/{run.title}"
        for run in runs
    ]
    return [
        replace(run, title=title if longer.count(title) == 1 else f"{title} ({i})")
        for i, (run, title) in enumerate(zip(runs, longer, strict=True), start=1)
    ]


def _slug(title: str, number: int) -> str:
    """A file name's part: letters, digits, dot and dash, and a number that makes it unique."""
    return f"{number}-{re.sub(r'[^A-Za-z0-9.]+', '-', title).strip('-.')[:60]}"
