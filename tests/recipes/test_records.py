"""T10: a recipe prints itself and reads itself back; anything else is refused."""

from __future__ import annotations

import json
import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convex_caldera import quantizers, transforms
from convex_caldera.core.recipe import METRICS, FactorCoding, FitLowRank, Quantize, Recipe
from convex_caldera.errors import RecipeError
from convex_caldera.quantizers.e8p import E8P
from convex_caldera.quantizers.trellis import Trellis
from convex_caldera.quantizers.uniform import Uniform
from convex_caldera.recipes.records import (
    canonical_json,
    from_record,
    from_toml,
    recipe_hash,
    to_record,
    to_toml,
)

some_quantizers = st.one_of(
    st.builds(E8P, st.sampled_from([2, 3, 4]), joint_scale=st.booleans()),
    st.builds(Uniform, st.integers(1, 8), group_size=st.sampled_from([-1, 0, 8, 128])),
)
some_quantize_steps = st.builds(
    Quantize,
    some_quantizers,
    st.sampled_from(METRICS),
    sweeps=st.integers(0, 9),
    downdate=st.booleans(),
    gains=st.lists(st.floats(0.1, 2.0), min_size=1, max_size=3).map(tuple),
)
some_codings = st.builds(
    FactorCoding, some_quantizers, iterations=st.integers(1, 9), feedback=st.booleans()
)
some_low_rank_steps = st.builds(
    FitLowRank, st.integers(0, 300), st.sampled_from(METRICS), st.none() | some_codings
)
some_recipes = st.builds(
    Recipe,
    st.lists(some_quantize_steps | some_low_rank_steps, min_size=1, max_size=3).map(tuple),
    transforms=st.just(()),
    sweeps=st.integers(1, 20),
    damping=st.floats(0, 1),
)
RECIPE = Recipe((FitLowRank(4, factors=FactorCoding(E8P(4))), Quantize(E8P(2), sweeps=2)))


@given(some_recipes)
def test_recipe_reads_itself_back(recipe: Recipe) -> None:
    record = to_record(recipe)
    assert from_record(record) == recipe
    assert from_record(json.loads(canonical_json(record))) == recipe
    assert from_record(from_toml(to_toml(record))) == recipe
    assert recipe_hash(from_record(record)) == recipe_hash(recipe)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Trellis(5), Trellis(5.0)),  # type: ignore[arg-type]
        (Quantize(Trellis(2), gains=(1,)), Quantize(Trellis(2.0), gains=(1.0,))),  # type: ignore[arg-type]
        (Recipe(RECIPE.steps, damping=0), Recipe(RECIPE.steps, damping=0.0)),
    ],
)
def test_equal_values_have_one_text(one: Any, other: Any) -> None:
    """What is planned by one of them may be stored by the other: their headers are as long."""
    assert one == other
    assert canonical_json(to_record(one)) == canonical_json(to_record(other))


def test_every_quantizer_and_transform_can_be_recorded() -> None:
    needed = {"e8p": (2,), "uniform": (2,), "normal_float": (2,)}
    needed |= {kind: (E8P(2),) for kind in ("double_scale", "strip_order")}
    for kind, cls in {**quantizers.TABLE, **transforms.TABLE}.items():
        assert cls.kind == kind
        value = cls(*needed.get(kind, ()))
        assert from_record(to_record(value)) == value


def test_whole_numbers_from_toml_become_floats() -> None:
    record = to_record(Quantize(E8P(2), gains=(1.0, 2.0)))
    record["gains"] = [1, 2]
    assert from_record(record).gains == (1.0, 2.0)
    assert all(type(gain) is float for gain in from_record(record).gains)


def test_defaults_may_be_left_out_by_hand() -> None:
    text = """
    kind = "recipe"
    [[steps]]
    kind = "quantize"
    quantizer = { kind = "e8p", bits = 2 }
    """
    assert from_record(from_toml(text)) == Recipe((Quantize(E8P(2)),))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("kind",), "recipes", "kind 'recipes'"),
        (("kind",), ["recipe"], "text `kind`"),
        (("colour",), 1, "unknown key 'colour'"),
        (("sweeps",), 1.5, "expected int"),
        (("sweeps",), True, "expected int"),
        (("sweeps",), 0, "sweeps must be"),
        (("damping",), "a lot", "expected float"),
        (("damping",), float("nan"), "expected float"),
        (("steps",), {}, "expected a list"),
        (("steps",), [], "without steps"),
        (("steps", 0, "rank"), -1, "rank must be"),
        (("steps", 0, "metric"), "half", "unknown metric|not one of"),
        (("steps", 0, "kind"), "recipe", "kind 'recipe'"),
        (("steps", 1, "quantizer"), {"kind": "e8p"}, "needs 'bits'"),
        (("steps", 1, "quantizer", "bits"), 5, "2, 3 or 4"),
        (("steps", 1, "quantizer", "kind"), "quantize", "kind 'quantize'"),
        (("steps", 0, "factors"), {"kind": "e8p", "bits": 2}, "kind 'e8p'"),
        (("steps", 0, "factors", "quantizer"), "e8p", "text `kind`"),
    ],
)
def test_bad_records_are_refused(path: tuple[Any, ...], value: Any, message: str) -> None:
    record = json.loads(canonical_json(to_record(RECIPE)))
    place = record
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(RecipeError, match=message):
        from_record(record)


def test_not_a_record_at_all() -> None:
    for value in (None, 3, "recipe", [], {}):
        with pytest.raises(RecipeError, match="text `kind`"):
            from_record(value)
    with pytest.raises(RecipeError, match="in no table"):
        to_record(object)


def test_canonical_json_is_one_text() -> None:
    assert canonical_json({"b": [1, 2.5], "a": "é"}) == '{"a":"\\u00e9","b":[1,2.5]}'
    for value in ({"x": float("nan")}, {"x": {1}}):
        with pytest.raises(RecipeError, match="JSON"):
            canonical_json(value)


def test_hash_is_of_the_canonical_json() -> None:
    other = Recipe((FitLowRank(5, factors=FactorCoding(E8P(4))), Quantize(E8P(2), sweeps=2)))
    assert recipe_hash(RECIPE) != recipe_hash(other)
    assert len(recipe_hash(RECIPE)) == 64


keys = st.text(min_size=1, max_size=6)
scalars = (
    st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
)
tables = st.recursive(
    st.dictionaries(keys, scalars | st.lists(scalars, max_size=3), max_size=3),
    lambda inner: st.dictionaries(
        keys, scalars | inner | st.lists(inner, min_size=1, max_size=2), max_size=3
    ),
    max_leaves=8,
)


@given(tables)
def test_toml_round_trip(table: dict[str, Any]) -> None:
    assert tomllib.loads(to_toml(table)) == table


def test_toml_reads_well() -> None:
    assert to_toml({"bits": 2.2, "plan": {"a.b": {"x": [1, 2]}}, "steps": [{"k": "v"}]}) == (
        'bits = 2.2\n\n[plan]\n\n[plan."a.b"]\nx = [1, 2]\n\n[[steps]]\nk = "v"\n'
    )
    with pytest.raises(RecipeError, match="not valid TOML"):
        from_toml("bits = ")
    with pytest.raises(RecipeError, match="TOML"):
        to_toml({"x": None})
