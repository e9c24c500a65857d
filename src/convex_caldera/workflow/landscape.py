"""Error over rank and bits: one matrix fitted with every rank at every rate.

The map shows what allocation chooses between: along a line of equal stored bits, where is the
least error? Every cell is a fit with the real quantizers, of the same recipe throughout.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

from convex_caldera.core.problem import Problem
from convex_caldera.fit.backfit import fit_layer
from convex_caldera.recipes.convex import (
    MEASURING_STATE_BITS,
    convex_caldera_recipe,
    menu_ranks,
)
from convex_caldera.workflow.fitting import side_by_side

BITS = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0)
RANKS = 6  # at most so many, from 0 to the largest of the menu


def layer_landscape(
    problem: Problem, *, seed: int, layer: str, site: str, workers: int
) -> dict[str, Any]:
    """A matrix's entry in landscape.json.

    Args:
        problem: W (m, n) and the metric that errors are under.
        seed, layer, site: as for `fit_layer`.
        workers: cells fitted at a time; does not change the result.

    Returns:
        `ranks` and `bits`; `relative_error` and `stored_bits` per weight, a row of each rank.

    Cost: 36 fits with trellises of 2^10 states.
    """
    shape = (problem.W.shape[0], problem.W.shape[1])
    ranks = landscape_ranks(shape)

    def work(cell: tuple[int, float]) -> tuple[float, float]:
        rank, bits = cell
        recipe = convex_caldera_recipe(bits, rank, state_bits=MEASURING_STATE_BITS)
        fit = fit_layer(problem, recipe, seed=seed, layer=layer, site=site)
        return fit.relative_loss, 8 * fit.layer.stored_bytes() / math.prod(shape)

    found = dict(side_by_side(work, list(itertools.product(ranks, BITS)), workers))
    return {
        "ranks": list(ranks),
        "bits": list(BITS),
        "relative_error": [[found[rank, bits][0] for bits in BITS] for rank in ranks],
        "stored_bits": [[found[rank, bits][1] for bits in BITS] for rank in ranks],
        "title": f"{layer}, convex-caldera's recipe",
    }


def landscape_ranks(shape: tuple[int, int]) -> tuple[int, ...]:
    """Ranks of the menu of a matrix, `RANKS` of them evenly where there are more."""
    menu = menu_ranks(shape)
    if len(menu) <= RANKS:
        return menu
    return tuple(menu[round(i * (len(menu) - 1) / (RANKS - 1))] for i in range(RANKS))
