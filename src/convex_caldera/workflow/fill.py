"""Uniform allocation: the same bits per weight for every layer, then the rest spread evenly.

What a method without an allocator does at a byte budget: every layer takes its highest rung
within one common number of bits per weight, the largest that all can afford together; what is
left lifts layers to the next rung one after another, in an order that spreads them over depth
and matrix types (van der Corput order of the list, which depends on positions only). This is the
baseline that an allocation has to beat.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from convex_caldera.errors import InfeasibleBudgetError


@dataclass(frozen=True)
class Rungs:
    """One layer's ladder as sizes: stored bytes of each rung, cheapest first."""

    name: str
    weights: int
    sizes: tuple[int, ...]

    def at(self, bits_per_weight: float) -> int:
        """The highest rung within that many bits per weight; the lowest if there is none."""
        limit = bits_per_weight * self.weights / 8
        return max(bisect_right(self.sizes, limit) - 1, 0)


def fill_uniformly(
    ladders: Sequence[Rungs], budget: int, measure: Callable[[Mapping[str, int]], int]
) -> dict[str, int]:
    """The rung of each layer under a byte budget.

    Args:
        ladders: one per layer, in model order.
        budget: bytes that the file may take.
        measure: exact file bytes of a choice {name: rung}; the sizes in `ladders` only guide.

    Raises:
        InfeasibleBudgetError: even the lowest rungs exceed the budget; says what is feasible.
    """
    lowest = {ladder.name: 0 for ladder in ladders}
    least = measure(lowest)
    if least > budget:
        raise InfeasibleBudgetError(
            f"the budget of {budget} bytes is below the least feasible {least} bytes",
            least_bits=8 * least,
        )
    choice = _highest_common(ladders, budget, measure)
    for position in spread(len(ladders)):
        ladder = ladders[position]
        rung = choice[ladder.name] + 1
        if rung < len(ladder.sizes):
            raised = {**choice, ladder.name: rung}
            if measure(raised) <= budget:
                choice = raised
    return choice


def spread(count: int) -> list[int]:
    """The positions 0 .. count - 1, each prefix spread evenly (van der Corput order)."""
    width = max(count - 1, 0).bit_length()
    reversed_bits = (int(f"{i:0{width}b}"[::-1], 2) if width else 0 for i in range(1 << width))
    return [i for i in reversed_bits if i < count]


def _highest_common(
    ladders: Sequence[Rungs], budget: int, measure: Callable[[Mapping[str, int]], int]
) -> dict[str, int]:
    """All layers at the largest common bits per weight whose measured file fits."""

    def choice_at(level: float) -> dict[str, int]:
        return {ladder.name: ladder.at(level) for ladder in ladders}

    levels = sorted({8 * size / ladder.weights for ladder in ladders for size in ladder.sizes})
    fitting = bisect_right(levels, budget, key=lambda level: measure(choice_at(level)))
    return choice_at(levels[fitting - 1] if fitting else 0.0)
