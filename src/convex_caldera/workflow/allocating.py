"""Convex allocation of bits and rank over a whole model, with its certificate.

spectra    singular values of every layer: what each rank would leave of it
probe      every layer at one rate or two, with the real quantizer
propose    the convex program on the fitted curves: a rate and a rank for each layer
measure    the few options around each proposal, with the real quantizer
decide     one option per layer by its measured loss under the byte budget, with a bound
store      the options chosen, as they were fitted already; or their recipes carried out once more,
           block after block, on targets that make up for the blocks before and with a more
           thorough search than they were measured with
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from convex_caldera.allocate.menu import Floats
from convex_caldera.allocate.rank_energy import spectrum
from convex_caldera.models.embeddings import EmbeddingSite
from convex_caldera.models.sites import Site
from convex_caldera.workflow.certifying import certificate_of
from convex_caldera.workflow.compression import Compression, Outcome
from convex_caldera.workflow.deciding import Decision, decide
from convex_caldera.workflow.distortion_unit import unit_of
from convex_caldera.workflow.fitting import side_by_side
from convex_caldera.workflow.held_out import held_out_scale
from convex_caldera.workflow.offers import Choice, Offers
from convex_caldera.workflow.operating_points import (
    Menus,
    OperatingPoints,
    measured_on_disk,
)
from convex_caldera.workflow.proposing import propose
from convex_caldera.workflow.rate_models import Probe
from convex_caldera.workflow.remeasuring import fit_rounds

Choices = Mapping[str, Sequence[Choice]]


def allocate_convex(compression: Compression) -> Outcome:
    """The plan, stored layer by layer, and its certificate.

    Raises:
        InfeasibleBudgetError: no plan of the options measured is within the budget.
    """
    offers = Offers(compression.job, _spectra(compression))
    probes = {name: offers.probes(name) for name in offers.sites}
    with measured_on_disk(compression) as kept:
        points = OperatingPoints(compression, kept, unit_of(compression.job))
        points = _measured_probes(points, offers, probes)
        proposal = propose(offers, _probed(points, probes))
        menus = {name: offers.menu(name, proposal) for name in offers.sites}
        points.measure(_candidates(offers, menus), "measure")
        offered = {name: offers.offered(menus[name], probes[name]) for name in offers.sites}
        candidates = _candidates(offers, offered)
        decision = decide(compression.job, candidates, points.curves(candidates, offers.ties))
        notes = _store(points, decision)
        return Outcome(decision.plan, certificate_of(points, decision, proposal), notes)


def _spectra(compression: Compression) -> dict[str, Floats]:
    """Squared singular values of every weight."""
    sites = compression.job.sites

    def work(site: Site) -> Floats:
        return spectrum(compression.fitter.weight(site))

    compression.progress.start("spectra", len(sites))
    found = {}
    for site, squares in side_by_side(work, sites, compression.workers):
        found[site.name] = squares
        compression.progress.advance(site.name)
    return found


def _candidates(offers: Offers, choices: Choices) -> Menus:
    return {
        name: [offers.candidate(name, choice) for choice in chosen]
        for name, chosen in choices.items()
    }


def _measured_probes(points: OperatingPoints, offers: Offers, probes: Choices) -> OperatingPoints:
    """The points with all probes among them, in the unit that the probes' held-out loss gives."""
    candidates = _candidates(offers, probes)
    points.measure(candidates, "probe")
    return replace(points, unit=replace(points.unit, scale=held_out_scale(points, candidates)))


def _probed(points: OperatingPoints, probes: Choices) -> dict[str, list[Probe]]:
    return {
        name: [Probe(c.bits, c.rank, points.distortion(name, c.label)) for c in chosen]
        for name, chosen in probes.items()
    }


def _store(points: OperatingPoints, decision: Decision) -> dict[str, Any]:
    """Store what was chosen: as it was measured, or fitted again in order under drift.

    Embeddings are not in any block, and stay as they were measured.
    """
    compression, choice = points.compression, decision.integer.choice
    if compression.job.targets == "original":
        points.store(choice)
        return {}
    sites = compression.job.sites
    points.store({s.name: choice[s.name] for s in sites if isinstance(s, EmbeddingSite)})
    return fit_rounds(compression, decision.plan.recipes)
