"""The public surface: these names and no others, so that any change of it shows in a review."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import convex_caldera

PUBLIC = [
    "Compressed",
    "CompressedLayer",
    "CompressedLinear",
    "FactorCoding",
    "Fit",
    "FitLowRank",
    "Hessian",
    "Problem",
    "Quantize",
    "Recipe",
    "SCLQuantizationParams",
    "__version__",
    "compress",
    "evaluate_models",
    "fit_layer",
    "load",
    "plot_accuracy_vs_bits",
    "plot_bit_allocation_heatmap",
    "plot_bits_heatmap",
    "plot_error_heatmap",
    "plot_error_vs_bits_by_rank",
    "plot_loss_vs_rank",
    "plot_singular_value_spectra",
    "plot_singular_values_comparison",
    "scl_quantize",
    "verify",
]
# Names that the rooms offer to those who build on this library.
ROOMS = {
    "convex_caldera.allocate": ["allocate", "frontier"],
    "convex_caldera.allocate.program": ["solve_program"],
    "convex_caldera.certify": ["verify"],
    "convex_caldera.compat": [
        "CalderaParams",
        "ConvexCalderaParams",
        "QuantizerFactory",
        "SCLQuantizationParams",
        "caldera",
        "convex_caldera",
        "evaluate_compression",
        "scl_quantize",
    ],
    "convex_caldera.errors": ["ConvexCalderaError", "InfeasibleBudgetError", "FormatError"],
    "convex_caldera.recipes.table": ["METHODS", "method"],
}


def test_public_names_are_these() -> None:
    assert sorted(convex_caldera.__all__) == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_there(name: str) -> None:
    value = getattr(convex_caldera, name)
    assert value is getattr(convex_caldera, name)
    assert name in dir(convex_caldera)
    assert (value.__doc__ and len(value.__doc__) > 20) or name == "__version__"


def test_dir_shows_nothing_else() -> None:
    shown = {name for name in dir(convex_caldera) if not name.startswith("__")}
    assert shown == set(PUBLIC) - {"__version__"}


def test_star_import_gives_the_public_names() -> None:
    namespace: dict[str, object] = {}
    exec("from convex_caldera import *", namespace)
    assert set(namespace) - {"__builtins__"} == set(PUBLIC)


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'compres'"):
        convex_caldera.compres  # noqa: B018


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_offer_their_names(room: str) -> None:
    module = importlib.import_module(room)
    assert [name for name in ROOMS[room] if not hasattr(module, name)] == []


def test_importing_does_no_work() -> None:
    script = (
        "import sys, convex_caldera\n"
        "heavy = {'torch', 'transformers', 'numpy', 'scipy', 'numba', 'matplotlib', 'typer'}\n"
        "print(sorted(heavy & set(sys.modules)), convex_caldera.__version__)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == f"[] {convex_caldera.__version__}\n", done.stderr
