"""Patterns for layer names."""

from __future__ import annotations

import pytest

from convex_caldera.errors import RecipeError
from convex_caldera.models.patterns import match, select

NAMES = tuple(
    f"model.layers.{block}.{part}"
    for block in (0, 1, 10)
    for part in ("self_attn.q_proj", "mlp.down_proj")
)


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("q_proj", 3),
        ("layers.1", 2),
        ("mlp.down_proj", 3),
        ("model.layers.0.self_attn.q_proj", 1),
        ("model.layers.*", 6),
        ("*.q_proj", 3),
        ("*.[01].*", 4),
        (r"re:layers\.1", 4),
        (r"re:^model\.layers\.(0|10)\.mlp", 2),
    ],
)
def test_select_counts(pattern, count):
    assert len(select([pattern], NAMES)) == count


@pytest.mark.parametrize("pattern", ["proj", "layer", "s.1", "q_pro"])
def test_match_plain_pattern_wants_whole_parts(pattern):
    assert not any(match([pattern], name) for name in NAMES)


def test_select_keeps_order_and_joins_patterns():
    assert select(["down_proj", "layers.0"], NAMES) == (NAMES[0], NAMES[1], NAMES[3], NAMES[5])
    assert select([], NAMES) == ()


@pytest.mark.parametrize("pattern", ["", "re:", "re:(", "no_such_layer"])
def test_select_refuses_bad_patterns(pattern):
    with pytest.raises(RecipeError):
        select([pattern], NAMES)
