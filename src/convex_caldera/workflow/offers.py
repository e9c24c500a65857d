"""Which options of a layer are fitted: a probe, then a few around what the program proposes.

A rank is chosen before anything is fitted, by the spectrum (`allocate.rank_energy`): the one
where u_r + k rho_r is least, which does not depend on the budget. The probe measures what a rate
costs at that rank; how fast that falls with the rate is the quantizer's law more than the
layer's, and is measured by a second probe of some layers only. The menu holds two rates around
the proposed one, and other ranks that the spectrum finds almost as good, rank 0 among them, at
the same total size; of rates that the user gave also the cheapest option.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from convex_caldera.allocate.menu import Floats
from convex_caldera.allocate.rank_energy import factor_noise, log_energies
from convex_caldera.allocate.surrogate import HIGH_RATE_DECAY
from convex_caldera.core.recipe import Recipe
from convex_caldera.models.embeddings import EmbeddingSite
from convex_caldera.recipes.convex import (
    BIT_STEP,
    LEAST_BITS,
    MEASURING_STATE_BITS,
    MOST_BITS,
    STATE_BITS,
    convex_caldera_recipe,
    expected_of_trial,
    menu_ranks,
)
from convex_caldera.recipes.embedding import embedding_recipe
from convex_caldera.recipes.guided import guided_recipe
from convex_caldera.workflow.job import Job
from convex_caldera.workflow.operating_points import Candidate
from convex_caldera.workflow.planning import layer_bytes, ties_of, wishes_of
from convex_caldera.workflow.proposal import Proposal
from convex_caldera.workflow.settings import parse_menu

# Rates offered around the proposed one, in bits per weight; how many of a menu that was given.
NEIGHBOURS = (-0.125, 0.125)
NEAREST_OF_MENU = 3
# The second probe is this much dearer than the first; one layer in so many has one.
PROBE_WIDTH, PROBE_STRIDE = 0.75, 4
# What must be left for codes beside the factors, above the least rate.
ROOM_FOR_CODES = 0.25
# Another rank is fitted if the spectrum finds it at most this much worse (log loss); rank 0 is
# what a layer without a low-rank term would be, and is given more benefit of the doubt.
ALMOST_AS_GOOD, NO_RANK_ALMOST_AS_GOOD = 0.05, 0.2


@dataclass(frozen=True, order=True)
class Choice:
    """One option of the menu: code bits per weight and rank."""

    bits: float
    rank: int = 0

    @property
    def label(self) -> str:
        return f"{self.bits:g}b r{self.rank}" if self.rank else f"{self.bits:g}b"


class Offers:
    """Options of all layers of a job; `spectra` are the squared singular values of each W."""

    def __init__(self, job: Job, spectra: Mapping[str, Floats]):
        self.job, self.spectra = job, spectra
        self.sites = {site.name: site for site in job.sites}
        self.weights = {name: s.shape[0] * s.shape[1] for name, s in self.sites.items()}
        self.ties = ties_of(job.settings.tie, job.sites)
        menu = job.settings.bits_menu
        given = () if menu is None else parse_menu(menu)
        self.given_rates = {on_grid(bits) for bits in given}
        self.target = 8 * job.budget.compressed_bytes / sum(self.weights.values())

    def candidate(self, name: str, choice: Choice) -> Candidate:
        """An option as it is measured and stored."""
        refitted = self.job.targets == "drift-corrected" and not self.is_embedding(name)
        recipe = self.recipe(name, choice)
        if not refitted:
            return Candidate(choice.label, recipe)
        trial = self.recipe(name, choice, MEASURING_STATE_BITS)
        return Candidate(choice.label, recipe, trial, expected_of_trial(choice.bits))

    def recipe(self, name: str, choice: Choice, state_bits: int = STATE_BITS) -> Recipe:
        """The recipe of an option; 2^state_bits states of its trellises."""
        factor_bits = wishes_of(self.job.settings, name).factor_bits
        recipe = convex_caldera_recipe(choice.bits, choice.rank, factor_bits, state_bits)
        if self.is_embedding(name):
            return embedding_recipe(recipe)
        guided = self.job.curvature == "guided"
        return guided_recipe(recipe, self.sites[name].shape) if guided else recipe

    def probes(self, name: str) -> list[Choice]:
        """A rate near the target at the rank that the spectrum favours; sometimes a higher too."""
        wishes = wishes_of(self.job.settings, name)
        if wishes.bits is not None:
            return [Choice(on_grid(wishes.bits), wishes.rank or 0)]
        members = self.members(name)
        rank = self._favoured(members)
        near = on_grid(self.target - self._shared_costs(members)[rank])
        # What an embedding costs is measured in another way, so its decay is its own too.
        if list(self.sites).index(members[0]) % PROBE_STRIDE and not self.is_embedding(name):
            return [Choice(near, rank)]
        low = on_grid(min(near, MOST_BITS - PROBE_WIDTH) - PROBE_WIDTH / 2)
        return [Choice(low, rank), Choice(low + PROBE_WIDTH, rank)]

    def menu(self, name: str, proposal: Proposal) -> list[Choice]:
        """Rates around the proposal, and other ranks at its size."""
        if self.is_pinned(name):
            return []
        members = self.members(name)
        total = sum(self.weights[member] for member in members)
        bits = sum(self.weights[m] * proposal.bits(m) for m in members) / total
        factors = sum(self.weights[m] * proposal.factor_bits(m) for m in members) / total
        costs = self._shared_costs(members)
        rank = min(costs, key=lambda r: (abs(costs[r] - factors), r))
        size = bits + factors
        choices = {Choice(b, rank) for b in self._rates_near(size - costs[rank])}
        for other in self._other_ranks(members, rank):
            centre = size - costs[other]
            choices.add(Choice(self._rate_at(centre), other))
        if self.given_rates:  # else the proposals alone fit the budget
            choices.add(Choice(min(self.given_rates), min(costs)))
        return sorted(choices)

    def is_pinned(self, name: str) -> bool:
        """Whether the user fixed the layer's rate, which leaves one option."""
        return wishes_of(self.job.settings, name).bits is not None

    def is_embedding(self, name: str) -> bool:
        """Whether the layer is an embedding or an output head."""
        return isinstance(self.sites[name], EmbeddingSite)

    def offered(self, menu: Sequence[Choice], probes: Sequence[Choice]) -> list[Choice]:
        """The options that the plan may choose: a menu that the user gave, else all measured."""
        settings = self.job.settings
        if menu and (settings.bits_menu is not None or settings.rank_menu is not None):
            return sorted(set(menu))
        return sorted({*menu, *probes})

    def ranks(self, members: Iterable[str]) -> list[int]:
        """Ranks on offer for layers that share a format, rising; 0 alone for embeddings.

        Rows of an embedding are tokens of very unequal frequency: the energy that a rank takes out
        of W says little of what it saves.
        """
        members, settings = list(members), self.job.settings
        most = min(min(self.sites[member].shape) for member in members)
        fixed = wishes_of(settings, members[0]).rank
        if fixed is not None:
            return [min(fixed, most)]
        if settings.rank_menu is not None:
            return sorted({min(int(r), most) for r in parse_menu(settings.rank_menu)})
        if any(self.is_embedding(member) for member in members):
            return [0]
        grids = (self._roomy_ranks(member) for member in members)
        return list(min(grids, key=len))

    def factor_bits(self, name: str, ranks: Sequence[int]) -> list[float]:
        """What each rank's factors take, in bits per weight, scales and all."""
        shape = self.sites[name].shape
        without = layer_bytes(self.recipe(name, Choice(LEAST_BITS)), shape)
        sizes = (layer_bytes(self.recipe(name, Choice(LEAST_BITS, r)), shape) for r in ranks)
        return [8 * (size - without) / self.weights[name] for size in sizes]

    def log_energies(self, name: str, ranks: Sequence[int]) -> list[float]:
        """What each rank leaves of a layer's energy, as a logarithm."""
        noise = factor_noise(wishes_of(self.job.settings, name).factor_bits)
        return log_energies(self.spectra[name], ranks, noise)

    def members(self, name: str) -> tuple[str, ...]:
        """The layers that share this one's format, itself included."""
        return next((tie for tie in self.ties if name in tie), (name,))

    def _roomy_ranks(self, name: str) -> tuple[int, ...]:
        """The grid of ranks, as far as the budget leaves room for codes beside them."""
        room = self.target - LEAST_BITS - ROOM_FOR_CODES
        factor_bits = wishes_of(self.job.settings, name).factor_bits
        grid = menu_ranks(self.sites[name].shape, factor_bits)
        costs = self.factor_bits(name, grid)
        return tuple(r for r, cost in zip(grid, costs, strict=True) if r == 0 or cost <= room)

    def _shared_costs(self, members: Sequence[str]) -> dict[int, float]:
        """Factor bits per weight of each rank on offer, over all members."""
        ranks = self.ranks(members)
        total = sum(self.weights[m] for m in members)
        rows = [self.weights[m] * np.array(self.factor_bits(m, ranks)) for m in members]
        return dict(zip(ranks, (np.sum(rows, axis=0) / total).tolist(), strict=True))

    def _worth(self, members: Sequence[str]) -> dict[int, float]:
        """u_r + k rho_r of each rank on offer, averaged over members; the least is best."""
        costs = self._shared_costs(members)
        total = sum(self.weights[m] for m in members)
        rows = [self.weights[m] * np.array(self.log_energies(m, list(costs))) for m in members]
        energies = (np.sum(rows, axis=0) / total).tolist()
        return {
            rank: energy + HIGH_RATE_DECAY * cost
            for (rank, cost), energy in zip(costs.items(), energies, strict=True)
        }

    def _favoured(self, members: Sequence[str]) -> int:
        worth = self._worth(members)
        return min(worth, key=lambda rank: (worth[rank], rank))

    def _other_ranks(self, members: Sequence[str], rank: int) -> list[int]:
        """Rank 0, and the neighbours that the spectrum finds almost as good; a whole given menu."""
        worth = self._worth(members)
        if self.job.settings.rank_menu is not None:
            return [r for r in worth if r != rank]
        ranks = list(worth)
        near = ranks[max(ranks.index(rank) - 1, 0) : ranks.index(rank) + 2]
        limit = min(worth.values()) + ALMOST_AS_GOOD
        near = [r for r in near if r not in (0, rank) and worth[r] <= limit]
        none = [0] if worth.get(0, math.inf) <= limit + NO_RANK_ALMOST_AS_GOOD else []
        return near + [r for r in none if r != rank]

    def _rates_near(self, centre: float) -> set[float]:
        """Rates around a proposal; of a menu that the user gave, the nearest few."""
        if not self.given_rates:
            return {on_grid(centre + step) for step in NEIGHBOURS}
        nearest = sorted(self.given_rates, key=lambda bits: (abs(bits - centre), bits))
        return set(nearest[:NEAREST_OF_MENU])

    def _rate_at(self, centre: float) -> float:
        """The rate on offer that is nearest."""
        if not self.given_rates:
            return on_grid(centre)
        return min(self._rates_near(centre), key=lambda bits: (abs(bits - centre), bits))


def on_grid(bits: float) -> float:
    """The nearest rate on offer."""
    return min(max(round(bits / BIT_STEP) * BIT_STEP, LEAST_BITS), MOST_BITS)
