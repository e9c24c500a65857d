"""Every figure draws, is valid XML, says nothing in markup, and is the same every time."""

from __future__ import annotations

import sys
from xml.etree import ElementTree

import numpy as np
import pytest

from convex_caldera.errors import RecipeError, ShapeError
from convex_caldera.report import mission
from convex_caldera.report.plots import canvas
from convex_caldera.report.plots.by_layer import draw_by_layer
from convex_caldera.report.plots.byte_bars import draw_byte_bars
from convex_caldera.report.plots.calibration import draw_calibration, rank_correlation
from convex_caldera.report.plots.layer_map import draw_layer_map
from convex_caldera.report.plots.loss_left import draw_loss_left
from convex_caldera.report.plots.loss_rank import draw_loss_rank
from convex_caldera.report.plots.price import draw_price
from convex_caldera.report.plots.quality import Quality, draw_quality
from convex_caldera.report.plots.rank_bits import draw_rank_bits
from convex_caldera.report.plots.spectra import draw_spectra
from tests.examples import first

HOSTILE = "$\\frac{<b>&--> \x00\x1b]]>\u202e\ud83d\ude00"

FIGURES = {
    "layer_map": lambda: draw_layer_map(
        np.array([[1.0, np.nan], [2.0, 3.0]]), [HOSTILE, "b"], ["0", HOSTILE], quantity=HOSTILE
    ),
    "constant_map": lambda: draw_layer_map(np.ones((1, 30)), ["a"], ["0"] * 30, quantity="q"),
    "empty_map": lambda: draw_layer_map(np.full((1, 1), np.nan), ["a"], ["0"], quantity="q"),
    "quality": lambda: draw_quality(
        [Quality(HOSTILE, 2, 9.0, 0.1), Quality(HOSTILE, 3, 8.0), Quality("b", 2, 7.0)],
        quantity=HOSTILE,
        original=6.5,
        log=True,
    ),
    "loss_rank": lambda: draw_loss_rank({HOSTILE: [(0, 0.1), (4, 0.0)], "b": []}),
    "loss_left": lambda: draw_loss_left(
        {HOSTILE: [((0, 1, 2), (1.0, 0.2, 0.0)), ((0, 1), (1.0, 0.0))], "b": [((), ())]},
        chosen={HOSTILE: [0.0, 1.0]},
    ),
    "loss_left_empty": lambda: draw_loss_left({}),
    "spectra_some": lambda: draw_spectra({"a": [[3.0, 1.0]]}, index=[[1, 9]]),
    "spectra": lambda: draw_spectra({HOSTILE: [[3.0, 1.0, 0.0], [0.0]]}, names=[HOSTILE, "b"]),
    "price": lambda: draw_price(
        [2, 3, 4], [0.3, 0.1, 0.05], [0.2, 0.05, 0.0], plan=(3, 0.1, 0.1), budget=3, unit=HOSTILE
    ),
    "by_layer": lambda: draw_by_layer({HOSTILE: [(0, 0.1)], "b": [(1, 0.2)]}, quantity=HOSTILE),
    "byte_bars": lambda: draw_byte_bars(
        {HOSTILE: {"codes": 10, "signs": 2}, "b": {}}, ["codes", "signs"], quantity="kB"
    ),
    "calibration": lambda: draw_calibration(
        [1e-4, 0.0, 2e-3], [2e-4, 0.1, 2e-3], [HOSTILE, "b", "c"]
    ),
    "calibration_empty": lambda: draw_calibration([0.0], [0.0], ["a"]),
    "rank_bits": lambda: draw_rank_bits(
        np.array([[1.0, 0.01], [np.nan, 0.005]]), [0, 4], [2, 3], quantity=HOSTILE
    ),
    "rank_bits_contours": lambda: draw_rank_bits(
        np.ones((12, 12)),
        list(range(12)),
        list(range(12)),
        quantity="q",
        stored_bits=np.add.outer(np.arange(12), np.arange(12)),
        budget=7,
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    """Nobody looks at these pictures."""
    monkeypatch.setattr(canvas, "PNG_DPI", 50)


@pytest.mark.parametrize("name", first(6, FIGURES))
def test_figure_is_valid_svg(tmp_path, name):
    path = tmp_path / "figure.svg"
    assert canvas.save(FIGURES[name](), path) == [path]
    text = path.read_text(encoding="utf-8")
    root = ElementTree.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "mathdefault" not in text  # a number drawn as the source of its formula
    assert not root.findall(".//{http://www.w3.org/2000/svg}script")


@pytest.mark.slow
def test_png_and_svg_are_the_same_every_time(tmp_path):
    for round_ in "ab":
        paths = [tmp_path / round_ / f"f.{kind}" for kind in ("png", "svg")]
        canvas.save(FIGURES["quality"](), *paths)
    for kind in ("png", "svg"):
        assert (tmp_path / f"a/f.{kind}").read_bytes() == (tmp_path / f"b/f.{kind}").read_bytes()
    assert (tmp_path / "a/f.png").read_bytes().startswith(b"\x89PNG")


def test_style_does_not_leak():
    import matplotlib

    before = dict(matplotlib.rcParams)
    FIGURES["by_layer"]()
    assert dict(matplotlib.rcParams) == before
    assert "matplotlib.pyplot" not in sys.modules or not matplotlib.pyplot.get_fignums()


def test_missing_matplotlib_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(RecipeError, match=r"convex-caldera\[report\]"):
        FIGURES["quality"]()


def test_unknown_suffix_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"\.bmp"):
        canvas.save(FIGURES["by_layer"](), tmp_path / "figure.bmp")


def test_looks_are_distinct_and_the_product_keeps_its_own():
    names = ["gptq", "convex-caldera", "rtn", "caldera", "quip-sharp", "lqer"]
    looks = canvas.looks(names)
    assert list(looks) == names
    assert len({look["marker"] for look in looks.values()}) == len(names)
    assert len({look["color"] for look in looks.values()}) == len(names)
    assert looks["convex-caldera"]["color"] == canvas.VERMILLION
    many = canvas.looks(str(i) for i in range(40))
    assert len({(v["color"], v["marker"], str(v["linestyle"])) for v in many.values()}) == 40


def test_rank_correlation_is_spearmans():
    from scipy.stats import spearmanr  # slow to import

    rng = np.random.default_rng(0)
    for _ in range(20):
        x, y = rng.integers(0, 6, (2, 12)).astype(float)
        assert rank_correlation(x, y) == pytest.approx(spearmanr(x, y).statistic, abs=1e-12)
    assert np.isnan(rank_correlation(np.ones(3), np.arange(3.0)))


MISSION = {
    "plot_bit_allocation_heatmap": lambda p: mission.plot_bit_allocation_heatmap(
        [[2, 3], [4, 2], [3, 3]], p, groups=["q", "v"]
    ),
    "plot_accuracy_vs_bits": lambda p: mission.plot_accuracy_vs_bits(
        {"a": ([2, 3], [0.5, 0.6])}, p, original=0.7
    ),
    "plot_loss_vs_rank": lambda p: mission.plot_loss_vs_rank([1, 2, 4], [0.3, 0.2, 0.1], p),
    "plot_singular_value_spectra": lambda p: mission.plot_singular_value_spectra(
        {"W": [1.0, 3.0, 2.0]}, p
    ),
    "plot_error_heatmap": lambda p: mission.plot_error_heatmap(
        [[0.2, 0.1]], [4], [2, 3], p, stored_bits=[[2.5, 3.5]]
    ),
    "plot_bits_heatmap": lambda p: mission.plot_bits_heatmap([[2.5, 3.5]], [4], [2, 3], p),
    "plot_error_vs_bits_by_rank": lambda p: mission.plot_error_vs_bits_by_rank(
        [[0.2, 0.1], [0.1, 0.05]], [0, 4], [2, 3], p
    ),
    "plot_singular_values_comparison": lambda p: mission.plot_singular_values_comparison(
        {"a": {"W": [3.0, 1.0]}, "b": {"W": [3.0, 1.0]}, "c": {"W": [1.0]}}, p
    ),
}


@pytest.mark.parametrize("name", mission.FILE_NAMES)
def test_mission_plot_writes_its_file(tmp_path, name):
    path = MISSION[name](tmp_path / mission.FILE_NAMES[name])
    assert path.read_bytes().startswith(b"\x89PNG")


def test_mission_plots_refuse_shapes_that_do_not_fit(tmp_path):
    path = tmp_path / "f.png"
    with pytest.raises(ShapeError, match="rows are ranks"):
        mission.plot_error_heatmap([[1, 2]], [1, 2], [3], path)
    with pytest.raises(ShapeError, match="2 names for 1 groups"):
        mission.plot_bit_allocation_heatmap([[1]], path, groups=["a", "b"])
    with pytest.raises(ShapeError, match="3 values"):
        mission.plot_loss_vs_rank([1, 2, 3], [1, 2], path)
    with pytest.raises(ShapeError, match="matrix"):
        mission.plot_bit_allocation_heatmap([1, 2], path)
    with pytest.raises(ShapeError, match="four"):
        mission.plot_singular_values_comparison({}, path)
    assert not path.exists()
