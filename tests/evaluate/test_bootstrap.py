from __future__ import annotations

import numpy as np
import pytest

from convex_caldera.errors import ShapeError
from convex_caldera.evaluate.bootstrap import paired_bootstrap


def test_interval_is_that_of_the_normal_law_for_many_items():
    random = np.random.default_rng(0)
    a, b = random.normal(0.3, 1, 2000), random.normal(0, 1, 2000)
    pair = paired_bootstrap(a, b)
    error = (a - b).std(ddof=1) / np.sqrt(2000)
    assert pair.difference == pytest.approx((a - b).mean())
    # 2000 resamples place a quantile to about 5 % of the standard error.
    assert pair.low == pytest.approx((a - b).mean() - 1.96 * error, abs=0.15 * error)
    assert pair.high == pytest.approx((a - b).mean() + 1.96 * error, abs=0.15 * error)
    assert pair.significant and pair.p_value < 0.002


def test_pairing_finds_what_two_separate_errors_hide():
    """Items of very different difficulty, one model a little better on each."""
    hardness = np.random.default_rng(1).normal(0, 5, 300)
    pair = paired_bootstrap(hardness + 0.1, hardness)
    assert pair.significant and pair.low == pytest.approx(0.1)
    alone = hardness.std() / np.sqrt(300)
    assert alone > 0.2


def test_equal_models_do_not_differ():
    pair = paired_bootstrap([0, 1, 1, 0], [0, 1, 1, 0])
    assert (pair.difference, pair.low, pair.high, pair.p_value) == (0, 0, 0, 1)
    assert not pair.significant


def test_false_alarms_come_as_often_as_promised():
    random = np.random.default_rng(2)
    alarms = [
        paired_bootstrap(*random.integers(0, 2, (2, 200)), resamples=400, seed=i).significant
        for i in range(300)
    ]
    assert 0.02 < np.mean(alarms) < 0.09


def test_parts_count_alike_and_swapping_turns_the_sign():
    parts = ["x"] * 30 + ["y"] * 3
    a, b = [1.0] * 30 + [0.0] * 3, [0.0] * 33
    pair, turned = paired_bootstrap(a, b, parts), paired_bootstrap(b, a, parts)
    assert pair.difference == 0.5 == -turned.difference
    assert pair.to_dict()["significant"] and pair.items == 33


def test_lengths_must_agree():
    with pytest.raises(ShapeError, match="got 2 and 1"):
        paired_bootstrap([1, 0], [1])
    with pytest.raises(ShapeError):
        paired_bootstrap([], [])
