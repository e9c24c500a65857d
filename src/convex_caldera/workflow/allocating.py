"""Convex allocation of bits and rank over a whole model, with its certificate.

    spectra    singular values of every layer: what each rank would leave of it
    probe      every layer at one rate or two, with the real quantizer
    propose    the convex program on the fitted curves: a rate and a rank for each layer
    measure    the few options around each proposal, with the real quantizer
    decide     one option per layer by its measured loss under the byte budget, with a bound
    store      the options chosen, which were fitted already

Every fit is kept on disk as it finishes, so a run that is cut short repeats none of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from convex_caldera.allocate.curves import Curves, Group, Option
from convex_caldera.allocate.menu import Floats, build_menus
from convex_caldera.allocate.plan import Plan as IntegerPlan
from convex_caldera.allocate.plan import allocate, certify_choice
from convex_caldera.allocate.rank_energy import spectrum
from convex_caldera.allocate.surrogate import HIGH_RATE_DECAY, RateModel, solve_surrogate
from convex_caldera.errors import InfeasibleBudgetError
from convex_caldera.models.sites import Site
from convex_caldera.recipes.convex import BIT_STEP, LEAST_BITS, MOST_BITS
from convex_caldera.recipes.records import canonical_json
from convex_caldera.storage.partial import PartialRun
from convex_caldera.workflow.certifying import certificate_of
from convex_caldera.workflow.curvatures import GRADIENT_KINDS, GradientCurvatures
from convex_caldera.workflow.fitting import Fitter, side_by_side
from convex_caldera.workflow.job import Job
from convex_caldera.workflow.offers import Choice, Offers
from convex_caldera.workflow.planning import Plan, layer_bytes, planned_bytes
from convex_caldera.workflow.progress import Progress
from convex_caldera.workflow.proposal import Proposal
from convex_caldera.workflow.sequential import in_order

# Header bytes depend on the plan and the plan on what they leave; a few rounds settle both.
HEADER_ROUNDS = 8
# Headers are planned for as many different rates, more than a plan has.
HEADER_RATES = 8
# A layer that does not react to its rate falls by this much a bit: any falling curve will do.
LEAST_DECAY = 1e-6


class Allocator:
    """One allocation: what is measured, what is proposed, what is decided."""

    def __init__(self, job: Job, fitter: Fitter, run: PartialRun, progress: Progress, workers: int):
        self.job, self.fitter, self.run = job, fitter, run
        self.progress, self.workers = progress, workers
        self.sites = {site.name: site for site in job.sites}
        self.weights = {name: s.shape[0] * s.shape[1] for name, s in self.sites.items()}
        self.unit = "nats" if job.curvature in GRADIENT_KINDS else "relative"
        self.scale: dict[str, float] = {}
        self.offers = Offers(job, self._spectra())

    def run_all(self) -> tuple[Plan, dict[str, Any]]:
        """The plan, stored layer by layer, and its certificate."""
        fingerprint = {"options": canonical_json(self.job.fingerprint())}
        with PartialRun(self.run.folder / "measured", fingerprint) as measured:
            probes = {name: self.offers.probes(name) for name in self.sites}
            self._measure(measured, probes, "probe")
            self.scale = self._held_out_scale(measured, probes)
            proposal = self._propose(measured, probes)
            menus = {name: self.offers.menu(name, proposal) for name in self.sites}
            self._measure(measured, menus, "measure")
            offered = {name: self.offers.offered(menus[name], probes[name]) for name in self.sites}
            curves = self._curves(measured, offered)
            plan, integer = self._decide(curves, offered)
            if self.job.settings.targets == "drift-corrected":
                in_order(self.job, self.fitter, plan.recipes, self.workers).run(
                    self.run, self.progress
                )
                curves = self._refitted(curves, integer)
                integer = certify_choice(curves, integer)
            else:
                self._store(measured, integer, offered)
        certificate = certificate_of(
            self.job, plan, integer, curves, proposal, self.unit, self.run, self.fitter, self.scale
        )
        return plan, certificate

    def _spectra(self) -> dict[str, Floats]:
        """Squared singular values of every weight."""
        self.progress.start("spectra", len(self.sites))
        found = {}
        for site, squares in side_by_side(self._spectrum, self.job.sites, self.workers):
            found[site.name] = squares
            self.progress.advance(site.name)
        return found

    def _spectrum(self, site: Site) -> Floats:
        return spectrum(self.fitter.weight(site))

    def _measure(
        self, measured: PartialRun, wanted: Mapping[str, Iterable[Choice]], stage: str
    ) -> None:
        done = measured.done()
        tasks = [
            (name, choice)
            for name, choices in wanted.items()
            for choice in sorted(set(choices))
            if _key(name, choice) not in done
        ]
        self.progress.start(stage, len(tasks))

        def work(task: tuple[str, Choice]) -> Any:
            name, choice = task
            return self.fitter.fit(self.sites[name], self.offers.recipe(name, choice))

        for (name, choice), fit in side_by_side(work, tasks, self.workers):
            record = self.fitter.record(self.sites[name], self.offers.recipe(name, choice), fit)
            measured.put(_key(name, choice), fit.layer, record)
            self.progress.advance(f"{name} {choice.label}")

    def _distortion(self, measured: PartialRun, name: str, choice: Choice) -> float:
        return self._in_unit(name, measured.record(_key(name, choice)))

    def _in_unit(self, name: str, record: Mapping[str, Any]) -> float:
        if self.unit == "nats":
            return float(record["loss"]) * self.scale.get(name, 1.0)
        return float(record["relative_loss"])

    def _held_out_scale(
        self, measured: PartialRun, probes: Mapping[str, list[Choice]]
    ) -> dict[str, float]:
        """By how much the probes cost more on held-out sequences than the curvature says.

        The curvature is fitted to the sequences that it was measured on and is a Kronecker
        product, which the Fisher matrix is not: both flatter it. Per layer the ratio of the
        held-out sequence Fisher to the Kronecker loss of the same errors, drawn halfway to the
        mean of all layers since it is noisy, scales every option of the layer alike.
        """
        curvatures = self.fitter.curvatures
        if not isinstance(curvatures, GradientCurvatures) or not curvatures.has_held_out:
            return {}
        errors = {}
        for name, choices in probes.items():
            W = self.fitter.weight(self.sites[name])
            errors[name] = [measured.get(_key(name, c)).decode() - W for c in choices]
        seen = curvatures.held_out_loss(errors, self.job.settings.seed, self.progress)
        logs = {}
        for name, choices in probes.items():
            said = [float(measured.record(_key(name, c))["loss"]) for c in choices]
            ratios = [a / b for a, b in zip(seen[name], said, strict=True) if a > 0 and b > 0]
            if ratios:
                logs[name] = sum(map(math.log, ratios)) / len(ratios)
        mean = sum(logs.values()) / max(len(logs), 1)
        return {name: math.exp(0.5 * (logs.get(name, mean) + mean)) for name in probes}

    def _rate_models(
        self, measured: PartialRun, probes: Mapping[str, list[Choice]]
    ) -> tuple[RateModel, ...]:
        """c from each layer's probe, k of two rates or as it is on average elsewhere."""
        logs = {
            name: [(c.bits, self._log_distortion(measured, name, c)) for c in choices]
            for name, choices in probes.items()
        }
        pairs = ((name, two) for name, two in logs.items() if len(two) == 2)
        decays = {
            name: max((low[1] - high[1]) / (high[0] - low[0]), LEAST_DECAY)
            for name, (low, high) in pairs
        }
        usual = sum(decays.values()) / len(decays) if decays else HIGH_RATE_DECAY
        return tuple(
            self._rate_model(name, probes[name], logs[name], decays.get(name, usual))
            for name in self.sites
        )

    def _rate_model(
        self, name: str, probes: list[Choice], logs: list[tuple[float, float]], decay: float
    ) -> RateModel:
        """c and k from what was measured; from the spectrum, what every rank saves and costs."""
        rank, fixed = probes[0].rank, self.offers.is_pinned(name)
        ranks = [rank] if fixed else self.offers.ranks(self.offers.members(name))
        costs = np.array(self.offers.factor_bits(name, ranks))
        energies = np.array(self.offers.log_energies(name, ranks))
        # The probes were made at one rank; c is the scale at the least one, where rho is 0.
        shift = energies[0] - energies[ranks.index(rank)]
        scale = math.exp(sum(d + decay * b for b, d in logs) / len(logs) + shift)
        bits = (probes[0].bits, probes[0].bits) if fixed else (LEAST_BITS, MOST_BITS)
        return RateModel(
            name, self.weights[name], 1.0, scale, decay, bits,
            tuple((costs - costs[0]).tolist()), tuple((energies - energies[0]).tolist()),
        )  # fmt: skip

    def _log_distortion(self, measured: PartialRun, name: str, choice: Choice) -> float:
        return math.log(max(self._distortion(measured, name, choice), 1e-300))

    def _propose(self, measured: PartialRun, probes: Mapping[str, list[Choice]]) -> Proposal:
        """Rates and factor bits of every layer by the convex program."""
        models = self._rate_models(measured, probes)
        # All that is stored beside the codes: scales, signs, the least ranks, and headers,
        # which are longest when every layer has a rate of its own.
        rates = [LEAST_BITS + i * BIT_STEP for i in range(HEADER_RATES)]
        spread = dict(zip(self.sites, itertools.cycle(rates), strict=False))
        base = {
            name: self.offers.recipe(name, Choice(spread[name], self._least_rank(name, probes)))
            for name in self.sites
        }
        shapes = {name: site.shape for name, site in self.sites.items()}
        codes = sum(spread[name] * self.weights[name] for name in self.sites)
        side = 8 * planned_bytes(base, shapes) - codes
        budget = 8 * self.job.budget.compressed_bytes - side
        least = sum(model.bits[0] * model.weights for model in models)
        solution = solve_surrogate(models, max(float(budget), least))
        return Proposal(models, solution, dict(zip(self.sites, range(len(models)), strict=True)))

    def _least_rank(self, name: str, probes: Mapping[str, list[Choice]]) -> int:
        """The rank that every option of a layer has at least."""
        if self.offers.is_pinned(name):
            return probes[name][0].rank
        return self.offers.ranks(self.offers.members(name))[0]

    def _curves(self, measured: PartialRun, offered: Mapping[str, list[Choice]]) -> Curves:
        groups = tuple(
            Group(
                name,
                self.weights[name],
                tuple(
                    Option(
                        choice.label,
                        8 * layer_bytes(self.offers.recipe(name, choice), self.sites[name].shape),
                        self._distortion(measured, name, choice),
                    )
                    for choice in choices
                ),
            )
            for name, choices in offered.items()
        )
        return Curves(groups, self.offers.ties)

    def _decide(
        self, curves: Curves, offered: Mapping[str, list[Choice]]
    ) -> tuple[Plan, IntegerPlan]:
        """The integer plan whose file, headers included, is within the budget."""
        shapes = {name: site.shape for name, site in self.sites.items()}
        by_label = {name: {c.label: c for c in choices} for name, choices in offered.items()}
        budget, header = self.job.budget.compressed_bytes, 0
        # What is left beside the cheapest plan; plans of many formats have longer headers.
        room = budget - build_menus(curves).least_bits // 8
        for left in reversed(range(HEADER_ROUNDS)):
            integer = allocate(curves, 8 * (budget - header))
            recipes = {
                name: self.offers.recipe(name, by_label[name][label])
                for name, label in integer.choice.items()
            }
            size = planned_bytes(recipes, shapes)
            needed = size - integer.bits // 8
            if needed <= header or header == room:
                break
            header = min(needed, room) if left > 1 else room
        if size > budget:
            raise InfeasibleBudgetError(
                f"{self.job.budget.wording}: {budget} bytes are below the least feasible {size}, "
                f"{needed} of them file headers",
                8 * size,
            )
        return Plan(recipes, shapes, size, self.job.budget), integer

    def _refitted(self, curves: Curves, integer: IntegerPlan) -> Curves:
        """The curves with the chosen options' distortions as their layers were fitted in order."""
        groups = []
        for group in curves.groups:
            found = self._in_unit(group.name, self.run.record(group.name))
            options = tuple(
                replace(o, distortion=found) if o.label == integer.choice[group.name] else o
                for o in group.options
            )
            groups.append(replace(group, options=options))
        return Curves(tuple(groups), curves.ties)

    def _store(
        self, measured: PartialRun, integer: IntegerPlan, offered: Mapping[str, list[Choice]]
    ) -> None:
        done = self.run.done()
        for name, choices in offered.items():
            choice = next(c for c in choices if c.label == integer.choice[name])
            if name not in done:
                key = _key(name, choice)
                self.run.put(name, measured.get(key), measured.record(key))


def _key(name: str, choice: Choice) -> str:
    return f"{name} {choice.label}"
