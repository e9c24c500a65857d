"""The convex program's data and its solution, by layer."""

from __future__ import annotations

from dataclasses import dataclass

from convex_caldera.allocate.surrogate import Allocation, RateModel


@dataclass(frozen=True)
class Proposal:
    """Rate models in the order of `index`, and what the program says of them."""

    models: tuple[RateModel, ...]
    solution: Allocation
    index: dict[str, int]

    def bits(self, name: str) -> float:
        return self.solution.bits[self.index[name]]

    def factor_bits(self, name: str) -> float:
        return self.solution.factor_bits[self.index[name]]
