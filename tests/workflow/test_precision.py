"""W4A8 and its like; budgets that follow from formats."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from convex_caldera.errors import RecipeError
from convex_caldera.recipes.table import method
from convex_caldera.workflow.evaluating import _with_activations
from convex_caldera.workflow.planning import fixed_budget, uniform_plan
from convex_caldera.workflow.precision import code_bits, precision_label
from convex_caldera.workflow.settings import make_settings


@dataclass(frozen=True)
class Matrix:
    name: str
    shape: tuple[int, int]


SITES = (Matrix("model.layers.0.a", (64, 48)), Matrix("model.layers.0.b", (48, 96)))


def settings(**values: object):
    return make_settings(**{"model": "m", "method": "l2qer", **values})


@pytest.mark.parametrize(
    ("bits", "activations", "label"),
    [
        ([4, 4], "mxint8/16", "W4A8"),
        ([4], None, "W4A16"),
        ([2, 4, 3], "none,attention:mxint6/16", "W2-4A6"),
        ([2.25], "e4m3/32", "W2.25A8"),
    ],
)
def test_labels(bits: list[float], activations: str | None, label: str) -> None:
    assert precision_label(bits, activations) == label


def test_the_bits_column_names_activations() -> None:
    cells = ("out", "1,000", "4.605", "9.9", "1", "0", "100 %")
    assert _with_activations(cells, None) == cells
    shown = _with_activations(cells, "mxint6/16")
    assert shown[2] == "4.605 A6" and shown[:2] + shown[3:] == cells[:2] + cells[3:]


def test_formats_that_leave_no_choice_are_their_own_budget() -> None:
    fixed = settings(format="mxint4/16", rank=5)
    budget = fixed_budget(fixed, SITES, method("l2qer"))
    assert budget is not None
    plan = uniform_plan(SITES, method("l2qer"), fixed, budget)
    assert plan.compressed_bytes == budget.compressed_bytes
    assert {recipe.rank for recipe in plan.recipes.values()} == {5}
    assert {code_bits(recipe) for recipe in plan.recipes.values()} == {4}


@pytest.mark.parametrize(
    "values", [{"format": "mxint4/16"}, {"rank": 5}, {"format": "mxint4", "rank": 5, "bits": 7.0}]
)
def test_otherwise_the_budget_decides(values: dict) -> None:
    assert fixed_budget(settings(**values), SITES, method("l2qer")) is None


def test_formats_are_refused_where_they_would_be_ignored() -> None:
    for values in ({"format": "int4"}, {"factor_format": "mxint8"}):
        made = settings(method="gptq", bits=8.0, **values)
        with pytest.raises(RecipeError, match=r"gptq has no (factor )?format"):
            fixed_budget(made.model_copy(update={"bits": None}), SITES, method("gptq"))


def test_activations_are_kept_in_one_spelling() -> None:
    assert settings(activations="mxint8,attention:mxint8").activations == "mxint8/32"
    with pytest.raises(RecipeError, match="width"):
        settings(activations="mxint")
