"""Spend what entropy coding saves: plans that count codes as they are coded.

How far codes shrink is known only once a layer is fitted. So the plan at fixed width, which no
coding exceeds, is fitted first; the bytes saved lift layers to higher rungs, of which the same
saving is expected (at high rates the entropy stays behind the width by a constant; Gish and
Pierce, IEEE Trans. Inf. Theory 14 (5), 1968); what is new is fitted and measured, and so on until
the plan stays. Only what was measured is stored, so the budget holds to the byte.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

from convex_caldera.core.recipe import Recipe
from convex_caldera.storage.layers import LayerEntry, planned_shard_bytes
from convex_caldera.storage.partial import PartialRun
from convex_caldera.storage.shard import DTYPES, read_header
from convex_caldera.workflow.compression import Compression
from convex_caldera.workflow.fill import Rungs, fill_uniformly
from convex_caldera.workflow.fitting import Task, fit_missing
from convex_caldera.workflow.operating_points import measured_on_disk
from convex_caldera.workflow.planning import Plan, ladder_of, layer_bytes, layout_of

# Rounds of planning and fitting, then the best of what was measured. Two or three are usual.
ROUNDS = 6

Choice = Mapping[str, int]  # layer -> rung of its ladder


def fit_spending(compression: Compression) -> Plan:
    """Fit and store every layer by a uniform plan that counts codes as they are coded.

    Cost: two or three fits a layer.
    """
    job, run = compression.job, compression.run
    ladders = {site.name: ladder_of(site, job.method, job.settings) for site in job.sites}
    shapes = {site.name: site.shape for site in job.sites}
    budget = job.budget.compressed_bytes
    coded = CodedLadders(ladders, shapes)
    with measured_on_disk(compression) as kept:
        choice = coded.fill(budget)
        for _ in range(ROUNDS):
            _measure(compression, coded, choice, kept)
            choice = coded.fill(budget)
            if coded.measured(choice):
                break
        else:
            choice = coded.fill(budget, only_measured=True)
        for name, rung in choice.items():
            if name not in run.done():
                run.put(name, kept.get(_key(name, rung)), kept.record(_key(name, rung)))
    recipes = {name: ladders[name][rung] for name, rung in choice.items()}
    return Plan(recipes, shapes, coded.bytes_of(choice), job.budget)


@dataclass(frozen=True)
class CodedLadders:
    """Ladders of recipes, and what those of their rungs that were fitted take in a file.

    Args:
        ladders: recipes by layer, by rising size at fixed width.
        shapes: of the layers.
        entries: by layer and rung.
    """

    ladders: Mapping[str, Sequence[Recipe]]
    shapes: Mapping[str, tuple[int, int]]
    entries: dict[tuple[str, int], LayerEntry] = field(default_factory=dict)

    def fill(self, budget: int, only_measured: bool = False) -> dict[str, int]:
        """A uniform choice within so many bytes, as far as sizes are known.

        Raises:
            InfeasibleBudgetError: the lowest rungs exceed them.
        """
        offered = {n: self._seen(n) if only_measured else range(len(self.ladders[n])) for n in self}
        sizes = {name: self._expected(name) for name in self}
        rungs = [
            Rungs(name, math.prod(self.shapes[name]), tuple(sizes[name][r] for r in offered[name]))
            for name in self
        ]

        def choice(positions: Choice) -> dict[str, int]:
            return {name: offered[name][at] for name, at in positions.items()}

        return choice(fill_uniformly(rungs, budget, lambda at: self._bytes(choice(at), sizes)))

    def bytes_of(self, choice: Choice) -> int:
        """File bytes, headers included: exact where all of a choice is measured."""
        return self._bytes(choice, {name: self._expected(name) for name in choice})

    def _bytes(self, choice: Choice, sizes: Mapping[str, Sequence[int]]) -> int:
        entries, expected = [], 0
        for name, rung in choice.items():
            entry = self.entries.get((name, rung))
            if entry is None:
                entry = LayerEntry(name, *layout_of(self.ladders[name][rung], self.shapes[name]))
                expected += sizes[name][rung] - self._widths[name][rung]
            entries.append(entry)
        return planned_shard_bytes(entries) + expected

    def measured(self, choice: Choice) -> bool:
        return all(item in self.entries for item in choice.items())

    def __iter__(self) -> Iterator[str]:
        return iter(self.ladders)

    @cached_property
    def _widths(self) -> dict[str, list[int]]:
        """Bytes of every rung at fixed width."""
        return {n: [layer_bytes(r, self.shapes[n]) for r in self.ladders[n]] for n in self}

    def _seen(self, name: str) -> list[int]:
        return [rung for rung in range(len(self.ladders[name])) if (name, rung) in self.entries]

    def _expected(self, name: str) -> list[int]:
        """Bytes of every rung, never falling: measured, or at fixed width less what the next

        lower measured one saves (the lowest, in proportion, for those below all of them).
        """
        widths, seen = self._widths[name], self._seen(name)
        if not seen:
            return widths
        found = []
        for rung, width in enumerate(widths):
            near = seen[max(bisect_right(seen, rung) - 1, 0)]
            size = _size(self.entries[name, near])
            found.append(max(width - (widths[near] - size), width * size // widths[near]))
        return list(accumulate(found, max))


def _measure(
    compression: Compression, coded: CodedLadders, choice: Choice, kept: PartialRun
) -> None:
    """Fit the rungs of a choice that are not fitted yet."""
    sites = {site.name: site for site in compression.job.sites}
    tasks = [
        Task(_key(name, rung), sites[name], coded.ladders[name][rung])
        for name, rung in choice.items()
    ]
    c = compression
    fit_missing(c.fitter, tasks, kept, "layers", c.progress, c.workers)
    for name, rung in choice.items():
        coded.entries[name, rung] = _stored(kept, name, rung)


def _stored(kept: PartialRun, name: str, rung: int) -> LayerEntry:
    """A fitted rung as it will stand in a file, under the name of its layer."""
    key = _key(name, rung)
    infos = [entry.info for entry in read_header(kept.artefact(key)).entries.values()]
    layout = {i.name.removeprefix(f"{key}."): (DTYPES[i.dtype], i.shape) for i in infos}
    return LayerEntry(name, kept.spec(key), layout)


def _size(entry: LayerEntry) -> int:
    return sum(info.num_bytes for info in entry.infos())


def _key(name: str, rung: int) -> str:
    return f"{name} {rung}"
