"""Nominal width, entropy and stored bits of a layer are three numbers in their right order."""

from __future__ import annotations

import pytest

from convex_caldera.coding import Rans
from convex_caldera.core.recipe import FactorCoding, FitLowRank, Quantize, Recipe
from convex_caldera.quantizers import E8P, ECSQ, LloydMax
from convex_caldera.workflow.code_rates import code_rates
from tests.storage.test_coded import fitted_layer

SHAPE = (96, 80)


def test_nominal_bits_are_the_width_and_entropy_lies_below() -> None:
    layer = fitted_layer(Recipe((Quantize(LloydMax(4), "identity"),)), SHAPE)
    rates = code_rates(layer)
    assert rates["nominal_bits"] == 4.0
    assert 1.0 < rates["entropy_bits"] < 4.0


def test_stored_bits_of_coded_codes_are_near_their_entropy() -> None:
    layer = fitted_layer(Recipe((Quantize(ECSQ(2.0), "full", coder=Rans(5)),)), (128, 256))
    rates, stored = code_rates(layer), 8 * layer.stored_bytes() / (128 * 256)
    assert rates["nominal_bits"] == 5.0
    assert rates["entropy_bits"] <= 2.01 and stored < rates["entropy_bits"] + 0.05


def test_coded_factors_count() -> None:
    recipe = Recipe((FitLowRank(4, factors=FactorCoding(E8P(4))), Quantize(E8P(2), "identity")))
    rates = code_rates(fitted_layer(recipe, SHAPE))
    assert rates["nominal_bits"] == pytest.approx(2 + 4 * 4 * (96 + 80) / (96 * 80))
