"""The certificate of a plan: the numbers that a checker replays, and what they prove in words."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from convex_caldera.allocate.curves import curves_to_dict
from convex_caldera.allocate.layer_program import layer_program
from convex_caldera.allocate.plan import Plan as IntegerPlan
from convex_caldera.allocate.waterfilling import waterfilling_bits
from convex_caldera.core.problem import Problem
from convex_caldera.models.sites import Site
from convex_caldera.workflow.deciding import Decision
from convex_caldera.workflow.fitting import side_by_side
from convex_caldera.workflow.operating_points import OperatingPoints
from convex_caldera.workflow.planning import wishes_of
from convex_caldera.workflow.proposal import Proposal

SCHEMA = 1
UNITS = {
    "nats": "predicted nats of KL per token",
    "relative": "sum over layers of relative weighted squared error",
}


DRIFT_STATEMENT = (
    " The options were measured with the original weights as targets, and some with a shorter "
    "search, their losses multiplied by what the longer one is known to leave of them; the layers "
    "of the plan were then fitted again, block after block, to targets that make up for the "
    "blocks before them. "
    "Each layer's own weighted error is that of the layer as stored, its option's beside it."
)


def certificate_of(
    points: OperatingPoints, decision: Decision, proposal: Proposal | None = None
) -> dict[str, Any]:
    """Plain JSON; docs/certificate.md states what each field means and how it is rechecked.

    Call it once the layers are stored: it states what they cost, beside what the options did.
    """
    compression, unit = points.compression, points.unit
    job, plan, integer = compression.job, decision.plan, decision.integer
    return {
        "statement": statement_of(integer, unit.name, job.targets),
        "schema": SCHEMA,
        "method": job.settings.method,
        "unit": unit.name,
        "curvature": job.curvature,
        "targets": job.targets,
        "budget_bytes": job.budget.compressed_bytes,
        "compressed_bytes": plan.compressed_bytes,
        "header_bytes": plan.compressed_bytes - integer.bits // 8,
        "reserved_bytes": job.budget.compressed_bytes - integer.budget_bits // 8,
        "curves": curves_to_dict(decision.curves),
        "plan": integer.to_dict(),
        "surrogate": None if proposal is None else _surrogate(proposal),
        "layers": _layers(points, decision),
    }


def statement_of(integer: IntegerPlan, unit: str, targets: str) -> str:
    """What the certificate proves, and what it does not."""
    gap = 100 * integer.plan_gap
    return (
        "Proves: the file is within its byte budget, and among all plans that choose one of the "
        f"measured options per layer in at most {integer.budget_bits} bits, none has less than "
        f"{integer.bound:.6g} {UNITS[unit]}; this one has {integer.distortion:.6g} (gap {gap:.4f} "
        "%). With the original model and the calibration statistics it also proves every layer's "
        "weighted error and the gap of its low-rank program. Does not prove: that the prediction "
        "equals the model's measured loss, or that options which were not measured are worse. Not "
        "recheckable from the files: the distortions of options that were not chosen, and "
        "held_out_scale, the factor between a layer's error and its distortion."
        + (DRIFT_STATEMENT if targets == "drift-corrected" else "")
    )


def _surrogate(proposal: Proposal) -> dict[str, Any]:
    solution = proposal.solution
    return {
        "form": "joint",
        "primal": solution.primal,
        "dual": solution.dual,
        "gap": solution.surrogate_gap,
        "price": solution.price,
        "budget_bits": solution.budget_bits,
        "groups": [
            {**asdict(model), "solution_bits": bits, "solution_factor_bits": factors}
            for model, bits, factors in zip(
                proposal.models, solution.bits, solution.factor_bits, strict=True
            )
        ],
    }


def _layers(points: OperatingPoints, decision: Decision) -> dict[str, Any]:
    """Per layer: option, bits, rank, losses, the waterfilling limit, and its low-rank program."""
    compression, integer = points.compression, decision.integer
    fitter = compression.fitter

    def work(site: Site) -> dict[str, Any]:
        name, label = site.name, integer.choice[site.name]
        record, option = compression.run.record(name), points.record(name, label)
        problem = fitter.problem(site)
        limit = _limit(problem, record["loss"])
        scale = points.unit.scale_of(name, option)
        factor_bits = wishes_of(compression.job.settings, name).factor_bits
        return {
            "label": label,
            "bits": record["bits"],
            "rank": record["rank"],
            "loss": record["loss"],
            "relative_loss": record["relative_loss"],
            "option_loss": option["loss"],
            "option_relative_loss": option["relative_loss"],
            "held_out_scale": scale,
            "gap_to_waterfilling_bits": None if limit is None else record["bits"] - limit,
            "program": _program(
                problem,
                record["loss"],
                integer.price * per_distortion(option["loss"], points.distortion(name, label)),
                factor_bits,
            ),
        }

    sites, workers = compression.job.sites, compression.workers
    found = {site.name: layer for site, layer in side_by_side(work, sites, workers)}
    return dict(sorted(found.items()))


def _limit(problem: Problem, loss: float) -> float | None:
    if problem.groups:  # the limit is known for one pair of metrics only
        return None
    inputs = torch.linalg.eigvalsh(problem.hessian.matrix).cpu().numpy()
    output = None
    if problem.output is not None:
        output = torch.linalg.eigvalsh(problem.output.matrix).cpu().numpy()
    variance = float(problem.W.double().square().mean())
    m, n = problem.W.shape
    limit = waterfilling_bits(variance, output, inputs, (m, n), loss)
    return limit if limit < float("inf") else None


def per_distortion(loss: float, distortion: float) -> float:
    """From the plan's unit to that of a layer's loss; 0 where the option costs nothing."""
    return loss / distortion if distortion > 0 else 0.0


def _program(
    problem: Problem, loss: float, price: float, factor_bits: int
) -> dict[str, Any] | None:
    """The low-rank program under the input side of the curvature, at the plan's price."""
    if loss <= 0 or price <= 0:
        return None
    return layer_program(problem.W, problem.hessian.matrix, loss, price, factor_bits)
