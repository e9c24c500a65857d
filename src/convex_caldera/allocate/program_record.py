"""The certificate of a convex program as plain data: docs/certificate.md section 5."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from convex_caldera.allocate.program import ProgramSolution
from convex_caldera.errors import ShapeError


def program_record(
    solution: ProgramSolution, names: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(JSON-able record, float64 tensors by key) from which both values can be recomputed.

    Args:
        solution: of `solve_program`.
        names: one per group.

    Raises:
        ShapeError: the names are not as many as the groups.
    """
    groups = len(solution.low_rank)
    if len(names) != groups or len(set(names)) != groups:
        raise ShapeError(f"{groups} groups need as many different names, got {list(names)}")
    constants = solution.constants
    form, weight = ("penalty", "mu") if constants["tau"] is None else ("constrained", "tau")
    fields = (weight, "lam", "kappa", "c", "k", "p", "b_min", "b_max")
    rows, tensors = [], {}
    for g, name in enumerate(names):
        left, right = solution.low_rank[g]
        dual = solution.duals[g]
        rows.append(
            {"name": name, "shape": [left.shape[0], right.shape[1]], "rank": left.shape[1]}
            | {field: float(constants[field][g]) for field in fields}
            | {
                "bits": solution.bits[g],
                "multiplier": solution.multipliers[g],
                "dual_scale": dual.scale,
            }
        )
        tensors[f"{name}.left"], tensors[f"{name}.right"] = left, right
        tensors[f"{name}.residual"] = solution.residual[g]
        tensors[f"{name}.dual_left"], tensors[f"{name}.dual_weights"] = dual.left, dual.weights
    record = {
        "form": form,
        "budget": solution.budget,
        "price": solution.price,
        "primal": solution.primal,
        "dual": solution.dual,
        "gap": solution.gap,
        "groups": rows,
    }
    return record, {key: tensor.contiguous() for key, tensor in tensors.items()}
