"""The convex program over a whole model: a rate and a rank for each layer, before the integers."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from convex_caldera.allocate.surrogate import solve_surrogate
from convex_caldera.recipes.convex import BIT_STEP, LEAST_BITS
from convex_caldera.workflow.offers import Choice, Offers
from convex_caldera.workflow.planning import planned_bytes
from convex_caldera.workflow.proposal import Proposal
from convex_caldera.workflow.rate_models import Probe, rate_models

# Headers are planned for as many different rates, more than a plan has.
HEADER_RATES = 8


def propose(offers: Offers, probes: Mapping[str, Sequence[Probe]]) -> Proposal:
    """Rates and factor bits of every layer by the convex program (`allocate.surrogate`).

    Args:
        offers: what may be chosen.
        probes: one or two of each layer, by rising rate, at one rank.
    """
    models = rate_models(offers, probes)
    budget = 8 * offers.job.budget.compressed_bytes - _side_bits(offers, probes)
    least = sum(model.bits[0] * model.weights for model in models)
    solution = solve_surrogate(models, max(float(budget), least))
    return Proposal(models, solution, dict(zip(offers.sites, range(len(models)), strict=True)))


def _side_bits(offers: Offers, probes: Mapping[str, Sequence[Probe]]) -> float:
    """All that is stored beside the codes: scales, signs, the least ranks, and headers,

    which are longest when every layer has a rate of its own.
    """
    rates = [LEAST_BITS + i * BIT_STEP for i in range(HEADER_RATES)]
    spread = dict(zip(offers.sites, itertools.cycle(rates), strict=False))
    base = {
        name: offers.recipe(name, Choice(spread[name], _least_rank(offers, name, probes[name])))
        for name in offers.sites
    }
    shapes = {name: site.shape for name, site in offers.sites.items()}
    codes = sum(spread[name] * offers.weights[name] for name in offers.sites)
    return 8 * planned_bytes(base, shapes) - codes


def _least_rank(offers: Offers, name: str, probes: Sequence[Probe]) -> int:
    """The rank that every option of a layer has at least."""
    return probes[0].rank if offers.is_pinned(name) else offers.ranks(offers.members(name))[0]
