"""Rate models D(b) = c e^(-k b) of layers, fitted to their probes; what ranks do, from spectra."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from convex_caldera.allocate.surrogate import HIGH_RATE_DECAY, RateModel
from convex_caldera.recipes.convex import LEAST_BITS, MOST_BITS
from convex_caldera.workflow.offers import Offers

# A layer that does not react to its rate falls by this much a bit: any falling curve will do.
LEAST_DECAY = 1e-6


@dataclass(frozen=True)
class Probe:
    """What a layer costs at one rate and rank."""

    bits: float
    rank: int
    distortion: float

    @property
    def log_distortion(self) -> float:
        return math.log(max(self.distortion, 1e-300))


def rate_models(offers: Offers, probes: Mapping[str, Sequence[Probe]]) -> tuple[RateModel, ...]:
    """c from each layer's probe, k of two rates or as it is on average elsewhere.

    Args:
        offers: the ranks on offer, what they cost and what they leave.
        probes: one or two of each layer, by rising rate, at one rank.
    """
    pairs = {name: found for name, found in probes.items() if len(found) == 2}
    decays = {name: _decay(low, high) for name, (low, high) in pairs.items()}
    usual = sum(decays.values()) / len(decays) if decays else HIGH_RATE_DECAY
    return tuple(
        _rate_model(offers, name, found, decays.get(name, usual)) for name, found in probes.items()
    )


def _decay(low: Probe, high: Probe) -> float:
    fall = low.log_distortion - high.log_distortion
    return max(fall / (high.bits - low.bits), LEAST_DECAY)


def _rate_model(offers: Offers, name: str, probes: Sequence[Probe], decay: float) -> RateModel:
    """c and k from what was measured; from the spectrum, what every rank saves and costs."""
    rank, fixed = probes[0].rank, offers.is_pinned(name)
    ranks = [rank] if fixed else offers.ranks(offers.members(name))
    costs = np.array(offers.factor_bits(name, ranks))
    energies = np.array(offers.log_energies(name, ranks))
    # The probes were made at one rank; c is the scale at the least one, where rho is 0.
    shift = energies[0] - energies[ranks.index(rank)]
    logs = (probe.log_distortion + decay * probe.bits for probe in probes)
    scale = math.exp(sum(logs) / len(probes) + shift)
    bits = (probes[0].bits, probes[0].bits) if fixed else (LEAST_BITS, MOST_BITS)
    return RateModel(
        name, offers.weights[name], 1.0, scale, decay, bits,
        tuple((costs - costs[0]).tolist()), tuple((energies - energies[0]).tolist()),
    )  # fmt: skip
