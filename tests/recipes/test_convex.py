"""The menu of convex allocation."""

from __future__ import annotations

import pytest

from convex_caldera.quantizers import Trellis
from convex_caldera.quantizers.distortion import gaussian_distortion
from convex_caldera.recipes.convex import MEASURING_STATE_BITS, STATE_BITS, expected_of_trial


@pytest.mark.parametrize("bits", [1.5, 2.25, 2.9375, 3.5, 4.75, 5.25])
def test_losses_of_trials_are_expected_to_fall_as_those_of_a_gaussian_do(bits: float) -> None:
    plan, trial = (
        gaussian_distortion(Trellis(bits, state_bits), (256, 256), seed=3)[0]
        for state_bits in (STATE_BITS, MEASURING_STATE_BITS)
    )
    assert expected_of_trial(bits) == pytest.approx(plan / trial, rel=0.025)
