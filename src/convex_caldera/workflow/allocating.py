"""Convex allocation of bits and rank over a whole model, with its certificate.

    probe      every layer at two rates and one rank, with the real quantizer
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
from dataclasses import dataclass, replace
from typing import Any

from convex_caldera.allocate.curves import Curves, Group, Option
from convex_caldera.allocate.menu import build_menus
from convex_caldera.allocate.plan import Plan as IntegerPlan
from convex_caldera.allocate.plan import allocate, certify_choice
from convex_caldera.allocate.surrogate import RateModel, fit_decay, solve_surrogate
from convex_caldera.core.recipe import Recipe
from convex_caldera.errors import InfeasibleBudgetError
from convex_caldera.recipes.convex import (
    BIT_STEP,
    LEAST_BITS,
    MOST_BITS,
    convex_caldera_recipe,
    menu_ranks,
)
from convex_caldera.recipes.guided import keep_rows_apart
from convex_caldera.recipes.records import canonical_json
from convex_caldera.storage.partial import PartialRun
from convex_caldera.workflow.certifying import certificate_of
from convex_caldera.workflow.curvatures import GRADIENT_KINDS, GradientCurvatures
from convex_caldera.workflow.fitting import Fitter, side_by_side
from convex_caldera.workflow.job import Job
from convex_caldera.workflow.planning import Plan, layer_bytes, planned_bytes, ties_of, wishes_of
from convex_caldera.workflow.progress import Progress
from convex_caldera.workflow.proposal import Proposal
from convex_caldera.workflow.sequential import in_order
from convex_caldera.workflow.settings import parse_menu

# Options offered around the proposed rate, in bits per weight.
NEIGHBOURS = (-0.25, 0.0, 0.25)
PROBE_HALF_WIDTH = 0.5
# Header bytes depend on the plan and the plan on what they leave; a few rounds settle both.
HEADER_ROUNDS = 8


@dataclass(frozen=True, order=True)
class Choice:
    """One option of the menu: code bits per weight and rank."""

    bits: float
    rank: int = 0

    @property
    def label(self) -> str:
        return f"{self.bits:g}b r{self.rank}" if self.rank else f"{self.bits:g}b"


class Allocator:
    """One allocation: what is measured, what is proposed, what is decided."""

    def __init__(self, job: Job, fitter: Fitter, run: PartialRun, progress: Progress, workers: int):
        self.job, self.fitter, self.run = job, fitter, run
        self.progress, self.workers = progress, workers
        self.sites = {site.name: site for site in job.sites}
        self.weights = {name: s.shape[0] * s.shape[1] for name, s in self.sites.items()}
        self.ties = ties_of(job.settings.tie, job.sites)
        self.unit = "nats" if job.curvature in GRADIENT_KINDS else "relative"
        self.scale: dict[str, float] = {}
        self.target = 8 * job.budget.compressed_bytes / sum(self.weights.values())

    def run_all(self) -> tuple[Plan, dict[str, Any]]:
        """The plan, stored layer by layer, and its certificate."""
        fingerprint = {"options": canonical_json(self.job.fingerprint())}
        with PartialRun(self.run.folder / "measured", fingerprint) as measured:
            probes = {name: self._probes(name) for name in self.sites}
            self._measure(measured, probes, "probe")
            self.scale = self._held_out_scale(measured, probes)
            proposal = self._propose(measured, probes)
            menus = {name: self._menu(name, proposal) for name in self.sites}
            self._measure(measured, menus, "measure")
            offered = {name: self._offered(menus[name], probes[name]) for name in self.sites}
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

    def recipe(self, name: str, choice: Choice) -> Recipe:
        """The recipe of an option."""
        factor_bits = wishes_of(self.job.settings, name).factor_bits
        recipe = convex_caldera_recipe(choice.bits, choice.rank, factor_bits)
        return keep_rows_apart(recipe) if self.job.curvature == "guided" else recipe

    def _probes(self, name: str) -> list[Choice]:
        """Two rates around the target, and one rank at the lower of them."""
        wishes = wishes_of(self.job.settings, name)
        if wishes.bits is not None:
            return [Choice(_on_grid(wishes.bits), wishes.rank or 0)]
        low = _on_grid(self.target - PROBE_HALF_WIDTH)
        high = _on_grid(low + 2 * PROBE_HALF_WIDTH)
        low = low if low < high else _on_grid(high - 2 * PROBE_HALF_WIDTH)
        if wishes.rank is not None:
            rank = min(wishes.rank, *self.sites[name].shape)
            return [Choice(low, rank), Choice(high, rank)]
        return [Choice(low), Choice(high), *(Choice(low, r) for r in self._probed_rank([name]))]

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
            return self.fitter.fit(self.sites[name], self.recipe(name, choice))

        for (name, choice), fit in side_by_side(work, tasks, self.workers):
            record = self.fitter.record(self.sites[name], self.recipe(name, choice), fit)
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

    def _rate_model(self, measured: PartialRun, name: str, probes: list[Choice]) -> RateModel:
        """c and k from the two rates; what the probed rank saves, at what it costs."""
        low, high = probes[0], probes[min(1, len(probes) - 1)]
        at_low = max(self._distortion(measured, name, low), 1e-300)
        if low == high:
            bits, scale, decay = (low.bits, low.bits), at_low, 1.0
        else:
            at_high = max(self._distortion(measured, name, high), 1e-300)
            bits = (LEAST_BITS, MOST_BITS)
            if at_high >= at_low:  # a layer that does not react: any falling curve will do
                scale, decay = at_low, 1e-6
            else:
                scale, decay = fit_decay([low.bits, high.bits], [at_low, at_high])
        factor_bits, log_energy = [0.0], [0.0]
        for choice in probes[2:]:
            saved = max(self._distortion(measured, name, choice), 1e-300) / at_low
            site = self.sites[name]
            extra = layer_bytes(self.recipe(name, choice), site.shape) - layer_bytes(
                self.recipe(name, low), site.shape
            )
            factor_bits.append(8 * extra / self.weights[name])
            log_energy.append(min(math.log(saved), 0.0))
        return RateModel(
            name, self.weights[name], 1.0, scale, decay, bits, tuple(factor_bits), tuple(log_energy)
        )

    def _propose(self, measured: PartialRun, probes: Mapping[str, list[Choice]]) -> Proposal:
        """Rates and factor bits of every layer by the convex program."""
        models = [self._rate_model(measured, name, probes[name]) for name in self.sites]
        # All that is stored beside the codes: scales, signs, ranks that are fixed, and headers,
        # which are longest when every layer has a rate of its own.
        rates = [LEAST_BITS + i * BIT_STEP for i in range(round(PROBE_HALF_WIDTH / BIT_STEP))]
        spread = dict(zip(self.sites, itertools.cycle(rates), strict=False))
        base = {
            name: self.recipe(name, Choice(spread[name], self._least_rank(name)))
            for name in self.sites
        }
        shapes = {name: site.shape for name, site in self.sites.items()}
        codes = sum(spread[name] * self.weights[name] for name in self.sites)
        side = 8 * planned_bytes(base, shapes) - codes
        budget = 8 * self.job.budget.compressed_bytes - side
        least = sum(model.bits[0] * model.weights for model in models)
        solution = solve_surrogate(models, max(float(budget), least))
        return Proposal(
            tuple(models), solution, dict(zip(self.sites, range(len(models)), strict=True))
        )

    def _menu(self, name: str, proposal: Proposal) -> list[Choice]:
        """Rates around the proposal, with the probed rank where the program buys one."""
        wishes = wishes_of(self.job.settings, name)
        if wishes.bits is not None:
            return []
        members = next((tie for tie in self.ties if name in tie), (name,))
        total = sum(self.weights[member] for member in members)
        centre = sum(self.weights[m] * proposal.bits(m) for m in members) / total
        factors = sum(self.weights[m] * proposal.factor_bits(m) for m in members) / total
        if wishes.rank is not None:
            ranks = [min(wishes.rank, *self.sites[name].shape)]
        elif self.job.settings.rank_menu is not None:
            ranks = self._ranks(members)
        else:
            ranks = [0, *self._probed_rank(members)] if factors > 0 else [0]
        # Without factors their bits go to the codes: both options are offered at one size.
        centres = {rank: centre if rank else centre + factors for rank in ranks}
        return [Choice(b, r) for r in ranks for b in sorted(self._rates_near(centres[r]))]

    def _least_rank(self, name: str) -> int:
        """The rank that every option of a layer has at least."""
        fixed = wishes_of(self.job.settings, name).rank
        if fixed is not None:
            return min(fixed, *self.sites[name].shape)
        return self._ranks([name])[0]

    def _probed_rank(self, members: Iterable[str]) -> list[int]:
        """The rank that stands for "some": the dearer of the cheap ones, if there is any."""
        return [rank for rank in self._ranks(members) if rank > 0][-1:]

    def _ranks(self, members: Iterable[str]) -> list[int]:
        """Ranks on offer for layers that share a format: 0 and those whose cost is small."""
        shapes = [self.sites[member].shape for member in members]
        most = min(min(shape) for shape in shapes)
        if self.job.settings.rank_menu is not None:
            return sorted({min(int(r), most) for r in parse_menu(self.job.settings.rank_menu)})
        return list(min(menu_ranks(s, self.job.settings.factor_bits)[:3] for s in shapes))

    def _offered(self, menu: list[Choice], probes: list[Choice]) -> list[Choice]:
        """The options that the plan may choose: a menu that the user gave, else all measured."""
        settings = self.job.settings
        if menu and (settings.bits_menu is not None or settings.rank_menu is not None):
            return sorted(set(menu))
        return sorted({*menu, *probes})

    def _rates_near(self, centre: float) -> set[float]:
        """Rates around a proposal; of a menu that the user gave, the nearest few."""
        if self.job.settings.bits_menu is None:
            return {_on_grid(centre + step) for step in NEIGHBOURS}
        menu = {_on_grid(bits) for bits in parse_menu(self.job.settings.bits_menu)}
        return set(sorted(menu, key=lambda bits: (abs(bits - centre), bits))[: len(NEIGHBOURS)])

    def _curves(self, measured: PartialRun, offered: Mapping[str, list[Choice]]) -> Curves:
        groups = tuple(
            Group(
                name,
                self.weights[name],
                tuple(
                    Option(
                        choice.label,
                        8 * layer_bytes(self.recipe(name, choice), self.sites[name].shape),
                        self._distortion(measured, name, choice),
                    )
                    for choice in choices
                ),
            )
            for name, choices in offered.items()
        )
        return Curves(groups, self.ties)

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
                name: self.recipe(name, by_label[name][label])
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


def _on_grid(bits: float) -> float:
    """The nearest rate on offer."""
    return min(max(round(bits / BIT_STEP) * BIT_STEP, LEAST_BITS), MOST_BITS)


def _key(name: str, choice: Choice) -> str:
    return f"{name} {choice.label}"
