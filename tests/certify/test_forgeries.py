"""Forgeries of every kind are rejected, honest outputs accepted (500 and 50 in the benchmark)."""

from __future__ import annotations

import pytest

from benchmarks.forgeries import Honest, forge
from benchmarks.forging.claims import CLAIMS
from benchmarks.forging.contents import CONTENTS
from convex_caldera.certify import verify
from convex_caldera.errors import RecipeError
from tests.certify.making import make
from tests.examples import first

KINDS = len(CLAIMS + CONTENTS)


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    made = [make(tmp_path_factory.mktemp("made") / "x", s, tied=bool(s % 2)) for s in range(2)]
    return [Honest(one.output, one.model, one.hessians) for one in made]


def test_honest_outputs_are_accepted(honest):
    for output, model, hessians in honest:
        for data in ((), (model,), (model, hessians)):
            found = verify(output, *data)
            assert found.ok, found.text()
        assert found.to_dict()["ok"]
        assert len(found.claims) == 13


@pytest.mark.parametrize("number", first(KINDS, range(3 * KINDS)))
def test_forgery_is_rejected(honest, tmp_path, number):
    kind, rejected, claim = forge(honest[number % 2], number, 7, tmp_path / "forged")
    assert rejected, f"{kind} passed; last claim: {claim}"


def test_statistics_need_the_model(honest):
    with pytest.raises(RecipeError, match="model"):
        verify(honest[0][0], hessians=honest[0][2])


def test_verification_stops_at_the_first_false_claim(honest, tmp_path):
    found = verify(tmp_path / "absent")
    assert [claim.holds for claim in found.claims] == [False]
    found = verify(honest[0][0], honest[1][1])
    assert [claim.holds for claim in found.claims].index(False) == len(found.claims) - 1
