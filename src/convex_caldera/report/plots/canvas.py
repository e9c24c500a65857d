"""What all figures share: one size, one type, colours that everybody can tell apart, and saving.

Colours are those of Okabe and Ito (Color Universal Design, 2008); every line also has a marker
and a dash of its own, so that a grey print or a colour-blind reader loses nothing. Maps use
cividis (Nunez, Anderton, Renslow 2018), whose lightness grows evenly. Figures are made without
pyplot: nothing global changes, and no display is needed. Text is drawn as outlines, so that a
file looks the same everywhere and needs no font.
"""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convex_caldera.errors import RecipeError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colorbar import Colorbar
    from matplotlib.figure import Figure

BLUE, VERMILLION, GREEN = "#0072B2", "#D55E00", "#009E73"
PURPLE, ORANGE, SKY, BLACK, GREY = "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#767676"
COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK)
MARKERS = "osD^vPX<>*"
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
SEQUENTIAL = "cividis"

# Inches. A page shows a figure 27 rem (4.5 inches) wide in two columns and 3.7 on a telephone:
# drawn at 4.9, 8.5 pt are 8 there and 6.5 here.
WIDTH, HEIGHT = 4.9, 3.3
PNG_DPI = 200
LONGEST_LABEL = 48

STYLE: Any = {  # dict of rcParams
    "font.family": ["DejaVu Sans"],
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.labelsize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#444444",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E2E2E2",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.5,
    "lines.markersize": 5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "figure.facecolor": "white",
    "text.parse_math": False,  # names of layers and models are text, whatever signs they hold
    "axes.formatter.use_mathtext": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "convex-caldera",
    "pdf.fonttype": 42,
}


@contextmanager
def style() -> Iterator[None]:
    """The house style, inside a `with` only.

    Raises:
        RecipeError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise RecipeError(
            "figures need matplotlib, which is not installed; "
            'install it with: pip install "convex-caldera[report]"'
        ) from error
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # A name in a script that the font lacks is drawn as boxes; the tables still show it.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def new_figure(
    rows: int = 1, columns: int = 1, *, height: float = HEIGHT, width: float = WIDTH, **options: Any
) -> tuple[Figure, Any]:
    """A figure and its axes (one, or an array as `Figure.subplots` gives); call inside `style`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, **options)


def save(figure: Figure, *paths: Path) -> list[Path]:
    """Write a figure once per path, by suffix (.png, .svg, .pdf); the same figure, same bytes."""
    with style():
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            kind = path.suffix.lower().removeprefix(".")
            if kind not in ("png", "svg", "pdf"):
                raise RecipeError(f"{path}: figures are written as .png, .svg or .pdf")
            when = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}
            when["pdf"] = {"CreationDate": None}
            figure.savefig(path, format=kind, dpi=PNG_DPI, metadata=when[kind])
    return list(paths)


def label(text: str, longest: int = LONGEST_LABEL) -> str:
    """One printable line for a figure: control characters out, the middle of long names out."""
    text = "".join(
        c if unicodedata.category(c)[0] != "C" else "\N{REPLACEMENT CHARACTER}" for c in text
    )
    text = " ".join(text.split()) or "(no name)"
    if len(text) <= longest:
        return text
    half = (longest - 1) // 2
    return f"{text[:half]}…{text[-half:]}"


def axis_label(text: str) -> str:
    """A label of an axis, line by line; units may come from files."""
    return "\n".join(label(line, 90) for line in text.split("\n"))


def looks(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Colour, marker and dash for every name, in the order given; the product comes first.

    `convex-caldera` is always vermillion with filled circles, so that pages can be compared.
    """
    names = list(names)
    found: dict[str, dict[str, Any]] = {}
    others = [c for c in COLOURS if c != VERMILLION or "convex-caldera" not in names]
    free = 0
    for name in names:
        if name in found:
            continue
        if name == "convex-caldera":
            found[name] = {"color": VERMILLION, "marker": "o", "linestyle": "-"}
            continue
        found[name] = {
            "color": others[free % len(others)],
            "marker": MARKERS[1:][free % (len(MARKERS) - 1)],
            "linestyle": DASHES[1:][free % (len(DASHES) - 1)],
        }
        free += 1
    return found


def legend_below(axes: Axes, columns: int = 3, **options: Any) -> None:
    """The legend under the whole figure, where it hides no point; none if there is one entry."""
    handles, names = axes.get_legend_handles_labels()
    figure = axes.get_figure()
    if len(handles) > 1 and figure is not None:
        figure.legend(handles, names, loc="outside lower center", ncols=columns, **options)


def log_scale(axes: Axes, which: str, values: Iterable[float]) -> None:
    """A logarithmic axis with plain numbers on it, if all values are positive."""
    from matplotlib.ticker import LogLocator, NullFormatter

    values = [v for v in values if v == v]
    if not values or min(values) <= 0:
        return
    getattr(axes, f"set_{which}scale")("log")
    axis = axes.xaxis if which == "x" else axes.yaxis
    decades = max(values) / min(values)
    axis.set_major_locator(LogLocator(10, subs=(1.0,) if decades > 300 else (1.0, 2.0, 5.0)))
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(_plain)


def plain_colour_bar(bar: Colorbar) -> None:
    """Plain numbers on a colour bar, whatever its scale."""
    from matplotlib.ticker import NullFormatter

    bar.ax.yaxis.set_major_formatter(_plain)
    bar.ax.yaxis.set_minor_formatter(NullFormatter())


def _plain(value: float, position: float | None = None) -> str:
    del position
    return f"{value:.3g}"
