"""Three rates of one layer's codes: their width, their entropy, and what is stored.

Width and entropy count the codes of all coded terms and factors alone, per weight of the layer;
the stored bits (`Fitter.record`) count every byte of the layer. The entropy is the empirical one
of order 0 of the symbols that an entropy coder would see (`coding.symbols`): about what it would
store, whether or not one is used.
"""

from __future__ import annotations

from collections.abc import Iterator

from convex_caldera.coding.symbols import entropy, symbol_bits
from convex_caldera.core.terms import Coded, CompressedLayer, Dense


def code_rates(layer: CompressedLayer) -> dict[str, float]:
    """Bits per weight: "nominal_bits" at fixed width, and "entropy_bits"."""
    weights = layer.shape[0] * layer.shape[1]
    coded = list(coded_matrices(layer))
    nominal = sum(8 * item.packed.numel() for item in coded)
    ideal = sum(entropy(item.packed, symbol_bits(item.fitted.quantizer)) for item in coded)
    return {"nominal_bits": nominal / weights, "entropy_bits": ideal / weights}


def coded_matrices(layer: CompressedLayer) -> Iterator[Coded]:
    """Coded terms and coded factors, in order."""
    for term in layer.terms:
        if isinstance(term, Coded):
            yield term
        else:
            yield from (side for side in (term.left, term.right) if not isinstance(side, Dense))
