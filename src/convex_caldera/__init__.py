"""Convex-CALDERA: compress language models by convex optimisation, and prove what was promised.

    from convex_caldera import compress, load

    compress("path/or/hub-id", bits=2.2, method="caldera").save("out")
    model = load("out")

Importing does no work: names are loaded from their rooms when first used. It makes transformers
aware of our format, so that `AutoModelForCausalLM.from_pretrained("out")` works afterwards.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from convex_caldera.runtime.hook import install as _install

if TYPE_CHECKING:
    from convex_caldera.certify import verify as verify
    from convex_caldera.compat.scl import SCLQuantizationParams as SCLQuantizationParams
    from convex_caldera.compat.scl import scl_quantize as scl_quantize
    from convex_caldera.core.hessian import Hessian as Hessian
    from convex_caldera.core.problem import Problem as Problem
    from convex_caldera.core.recipe import FactorCoding as FactorCoding
    from convex_caldera.core.recipe import FitLowRank as FitLowRank
    from convex_caldera.core.recipe import Quantize as Quantize
    from convex_caldera.core.recipe import Recipe as Recipe
    from convex_caldera.core.terms import CompressedLayer as CompressedLayer
    from convex_caldera.fit.backfit import Fit as Fit
    from convex_caldera.fit.backfit import fit_layer as fit_layer
    from convex_caldera.report.mission import plot_accuracy_vs_bits as plot_accuracy_vs_bits
    from convex_caldera.report.mission import (
        plot_bit_allocation_heatmap as plot_bit_allocation_heatmap,
    )
    from convex_caldera.report.mission import plot_bits_heatmap as plot_bits_heatmap
    from convex_caldera.report.mission import plot_error_heatmap as plot_error_heatmap
    from convex_caldera.report.mission import (
        plot_error_vs_bits_by_rank as plot_error_vs_bits_by_rank,
    )
    from convex_caldera.report.mission import plot_loss_vs_rank as plot_loss_vs_rank
    from convex_caldera.report.mission import (
        plot_singular_value_spectra as plot_singular_value_spectra,
    )
    from convex_caldera.report.mission import (
        plot_singular_values_comparison as plot_singular_values_comparison,
    )
    from convex_caldera.runtime.linear import CompressedLinear as CompressedLinear
    from convex_caldera.runtime.load import load as load
    from convex_caldera.workflow.api import Compressed as Compressed
    from convex_caldera.workflow.api import compress as compress
    from convex_caldera.workflow.evaluating import evaluate_models as evaluate_models

__version__ = "0.1.0"

# Public name -> (module, name there).
_HOME = {
    "CompressedLayer": ("core.terms", "CompressedLayer"),
    "Compressed": ("workflow.api", "Compressed"),
    "CompressedLinear": ("runtime.linear", "CompressedLinear"),
    "FactorCoding": ("core.recipe", "FactorCoding"),
    "Fit": ("fit.backfit", "Fit"),
    "FitLowRank": ("core.recipe", "FitLowRank"),
    "Hessian": ("core.hessian", "Hessian"),
    "Problem": ("core.problem", "Problem"),
    "Quantize": ("core.recipe", "Quantize"),
    "Recipe": ("core.recipe", "Recipe"),
    "SCLQuantizationParams": ("compat.scl", "SCLQuantizationParams"),
    "compress": ("workflow.api", "compress"),
    "evaluate_models": ("workflow.evaluating", "evaluate_models"),
    "fit_layer": ("fit.backfit", "fit_layer"),
    "load": ("runtime.load", "load"),
    "plot_accuracy_vs_bits": ("report.mission", "plot_accuracy_vs_bits"),
    "plot_bit_allocation_heatmap": ("report.mission", "plot_bit_allocation_heatmap"),
    "plot_bits_heatmap": ("report.mission", "plot_bits_heatmap"),
    "plot_error_heatmap": ("report.mission", "plot_error_heatmap"),
    "plot_error_vs_bits_by_rank": ("report.mission", "plot_error_vs_bits_by_rank"),
    "plot_loss_vs_rank": ("report.mission", "plot_loss_vs_rank"),
    "plot_singular_value_spectra": ("report.mission", "plot_singular_value_spectra"),
    "plot_singular_values_comparison": ("report.mission", "plot_singular_values_comparison"),
    "scl_quantize": ("compat.scl", "scl_quantize"),
    "verify": ("certify", "verify"),
}

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOME[name]
    value = getattr(import_module(f"{__name__}.{module}"), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


_install()
