"""The one plot of a sweep: perplexity against stored bits, a line per value of its first axis."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convex_caldera.report.plots.canvas import save
from convex_caldera.report.plots.quality import Quality, draw_quality
from convex_caldera.workflow.sweep import points


def plot_sweep(record: Mapping[str, Any], out: Path) -> list[Path]:
    """OUT/sweep.png and .svg; nothing where no cell has a perplexity.

    Raises:
        RecipeError: matplotlib is not installed.
    """
    drawn = [Quality(*point) for point in points(record)]
    if not drawn:
        return []
    originals = {row["original_perplexity"] for row in record["cells"] if "perplexity" in row}
    figure = draw_quality(
        drawn,
        quantity="perplexity",
        original=originals.pop() if len(originals) == 1 else None,
        log=max(p.value for p in drawn) > 4 * min(p.value for p in drawn),
    )
    return save(figure, out / "sweep.png", out / "sweep.svg")
