"""What is offered to the plan: from rates that the user gave, always what they cost at least."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from convex_caldera.workflow.compress import prepare
from convex_caldera.workflow.offers import Choice, Offers
from convex_caldera.workflow.settings import make_settings

BUDGET = 4.0


@pytest.fixture
def offers(tiny_model: Callable[..., Path], text: Path) -> Callable[..., Offers]:
    """Offers for layers of which the first few singular directions hold nearly everything."""

    def make(**options: object) -> Offers:
        settings = make_settings(
            model=str(tiny_model("llama", hidden_size=64, intermediate_size=128)),
            method="convex-caldera", bits=BUDGET, dataset=str(text), nsamples=4, seqlen=32,
            **options,
        )  # fmt: skip
        job = prepare(settings)
        falling = {site.name: np.exp(-3.0 * np.arange(min(site.shape))) for site in job.sites}
        return Offers(job, falling)

    return make


def proposal(offers: Offers, name: str) -> SimpleNamespace:
    """The budget spent evenly, at the rank that the spectrum favours."""
    rank = offers.probes(name)[0].rank
    factors = offers.factor_bits(name, [rank])[0]
    return SimpleNamespace(bits=lambda _: BUDGET - factors, factor_bits=lambda _: factors)


def test_the_least_of_given_rates_is_offered_without_low_rank(offers) -> None:
    made = offers(bits_menu="2,4")
    for name in made.sites:
        menu = made.menu(name, proposal(made, name))
        assert any(choice.rank > 0 for choice in menu), "the spectrum favours a low-rank term"
        assert min(menu) == Choice(2.0, 0)
        assert {choice.bits for choice in menu} <= {2.0, 4.0}


def test_of_given_ranks_too_the_least_is_offered(offers) -> None:
    made = offers(bits_menu="2,4", rank_menu="1,2")
    for name in made.sites:
        assert min(made.menu(name, proposal(made, name))) == Choice(2.0, 1)


def test_options_are_about_as_large_as_proposed_where_no_rates_are_given(offers) -> None:
    made = offers()
    for name in made.sites:
        for choice in made.menu(name, proposal(made, name)):
            size = choice.bits + made.factor_bits(name, [choice.rank])[0]
            assert size == pytest.approx(BUDGET, abs=0.2)
