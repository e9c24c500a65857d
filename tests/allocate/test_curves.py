"""Curves read back what was written, and every fault of a file has its own clear error."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convex_caldera.allocate import (
    Curves,
    Group,
    Option,
    loads_curves,
    read_curves,
    write_curves,
)
from convex_caldera.allocate.menu import build_menus, lower_hull
from convex_caldera.errors import DataError, RecipeError
from tests.examples import examples

GOOD = {
    "groups": [
        {"name": "q", "weights": 8, "options": [{"label": "2b", "bits": 16, "distortion": 0.25}]},
        {
            "name": "k",
            "weights": 8,
            "options": [
                {"label": "2b", "bits": 16, "distortion": 0.5},
                {"label": "3b", "bits": 24, "distortion": 0.125},
            ],
        },
    ],
    "ties": [["q", "k"]],
}


def _changed(path: list, value) -> str:
    record = json.loads(json.dumps(GOOD))
    at = record
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return json.dumps(record)


@given(st.lists(st.tuples(st.integers(0, 2**53), st.floats(0, 1e300)), min_size=1, max_size=6))
@examples(50)
def test_curves_round_trip_bit_for_bit(tmp_path_factory, points):
    options = tuple(Option(f"o{i}", bits, loss) for i, (bits, loss) in enumerate(points))
    curves = Curves((Group("a", 3, options), Group("b", 0, options)), (("b",),))
    path = tmp_path_factory.mktemp("curves") / "curves.json"
    write_curves(curves, path)
    assert read_curves(path) == curves


OPTION = ["groups", 0, "options", 0]


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        (_changed([*OPTION, "distortion"], float("nan")), DataError, "NaN"),
        (_changed([*OPTION, "distortion"], float("inf")), DataError, "Infinity"),
        (_changed([*OPTION, "distortion"], -1e-9), DataError, "-1e-09"),
        (_changed([*OPTION, "distortion"], "0.1"), DataError, "must be a number"),
        (_changed([*OPTION, "bits"], -1), DataError, "between 0"),
        (_changed([*OPTION, "bits"], 16.0), DataError, "integer"),
        (_changed([*OPTION, "bits"], True), DataError, "integer"),
        (_changed([*OPTION, "label"], ""), DataError, "label"),
        (_changed([*OPTION, "cost"], 1), DataError, "unknown key 'cost'"),
        (_changed(["groups", 0, "options"], []), DataError, "'q' has no options"),
        (_changed(["groups", 1, "options", 1, "label"], "2b"), DataError, "'2b' twice"),
        (_changed(["groups", 1, "name"], "q"), DataError, "two groups"),
        (_changed(["groups", 0, "weights"], -4), DataError, "weights"),
        (_changed(["groups"], []), DataError, "no groups"),
        (_changed(["ties"], [["q", "v"]]), RecipeError, "'v'"),
        (_changed(["ties"], [["q"], ["q", "k"]]), RecipeError, "two ties"),
        (_changed(["ties"], [[]]), RecipeError, "no group"),
        (_changed(["ties"], [[1]]), DataError, "names of groups"),
        (_changed(["tie"], []), DataError, "unknown key 'tie'"),
        ('{"groups": [], "groups": []}', DataError, "twice"),
        ("{", DataError, "not JSON"),
        ("[]", DataError, "object"),
    ],
)
def test_curves_fault_has_one_clear_error(text, error, says):
    with pytest.raises(error, match=says):
        loads_curves(text)


def test_curves_missing_file_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="cannot read"):
        read_curves(tmp_path / "none.json")


def test_menu_of_a_tie_is_the_labels_all_members_share():
    (menu,) = build_menus(loads_curves(json.dumps(GOOD))).menus
    assert (menu.members, menu.labels, menu.bits) == (("k", "q"), ("2b",), (32,))
    assert menu.distortion == (0.75,)


def test_menu_of_a_tie_without_common_label_is_refused():
    with pytest.raises(RecipeError, match="no label in common"):
        build_menus(loads_curves(_changed([*OPTION, "label"], "8b")))


@pytest.mark.parametrize(
    ("pins", "says"),
    [
        ({"v": "2b"}, "'v'"),
        ({"k": "9b"}, "no option '9b'"),
        ({"k": "3b"}, "not offered by all"),
        ({"k": "3b", "q": "2b"}, "pinned to"),
    ],
)
def test_menu_contradictory_pin_is_refused(pins, says):
    with pytest.raises(RecipeError, match=says):
        build_menus(loads_curves(json.dumps(GOOD)), pins)


@given(st.lists(st.tuples(st.integers(0, 40), st.floats(0, 8)), min_size=1, max_size=12))
def test_hull_is_below_every_point_and_descends_convexly(points):
    points.sort()
    bits, loss = [p[0] for p in points], [p[1] for p in points]
    hull = lower_hull(bits, loss)
    slopes = [(loss[i] - loss[j]) / (bits[j] - bits[i]) for i, j in itertools.pairwise(hull)]
    assert hull[0] == 0
    assert loss[hull[-1]] == min(loss)
    assert all(s > 0 for s in slopes)
    assert slopes == sorted(slopes, reverse=True)
    for w, d in points:
        for i, s in zip(hull, slopes, strict=False):
            assert d >= loss[i] - s * (w - bits[i]) - 1e-9
