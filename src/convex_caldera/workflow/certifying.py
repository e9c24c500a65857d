"""The certificate of a plan: the numbers that a checker replays, and what they prove in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from convex_caldera.allocate.curves import Curves, curves_to_dict
from convex_caldera.allocate.plan import Plan as IntegerPlan
from convex_caldera.allocate.waterfilling import waterfilling_bits
from convex_caldera.storage.partial import PartialRun
from convex_caldera.workflow.fitting import Fitter, side_by_side
from convex_caldera.workflow.job import Job
from convex_caldera.workflow.planning import Plan
from convex_caldera.workflow.proposal import Proposal

SCHEMA = 1
UNITS = {
    "nats": "predicted nats of KL per token",
    "relative": "sum over layers of relative weighted squared error",
}


def certificate_of(
    job: Job,
    plan: Plan,
    integer: IntegerPlan,
    curves: Curves,
    proposal: Proposal,
    unit: str,
    run: PartialRun,
    fitter: Fitter,
    scale: Mapping[str, float],
) -> dict[str, Any]:
    """Plain JSON; docs/certificate.md states what each field means and how it is rechecked."""
    return {
        "schema": SCHEMA,
        "statement": _statement(integer, unit),
        "method": job.settings.method,
        "unit": unit,
        "curvature": job.curvature,
        "budget_bytes": job.budget.compressed_bytes,
        "compressed_bytes": plan.compressed_bytes,
        "header_bytes": plan.compressed_bytes - integer.bits // 8,
        "curves": curves_to_dict(curves),
        "plan": integer.to_dict(),
        "surrogate": _surrogate(proposal),
        "layers": _layers(job, integer, run, fitter, scale),
    }


def _statement(integer: IntegerPlan, unit: str) -> str:
    gap = 100 * integer.plan_gap
    return (
        "Proves: the file is within its byte budget, and among all plans that choose one of the "
        f"measured options per layer within it, none has less than {integer.bound:.6g} "
        f"{UNITS[unit]}; "
        f"this one has {integer.distortion:.6g} (gap {gap:.4f} %). Does not prove: that the "
        "prediction equals the model's measured loss, or that options which were not measured "
        "are worse."
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


def _layers(
    job: Job, integer: IntegerPlan, run: PartialRun, fitter: Fitter, scale: Mapping[str, float]
) -> dict[str, Any]:
    """Per layer: option, bits, rank, losses, and the distance from the waterfilling limit."""

    def work(name: str) -> dict[str, Any]:
        site = next(s for s in job.sites if s.name == name)
        record = run.record(name)
        limit = _limit(fitter, site, record["loss"])
        return {
            "label": integer.choice[name],
            "bits": record["bits"],
            "rank": record["rank"],
            "loss": record["loss"],
            "relative_loss": record["relative_loss"],
            "held_out_scale": scale.get(name, 1.0),
            "gap_to_waterfilling_bits": None if limit is None else record["bits"] - limit,
        }

    names = [site.name for site in job.sites]
    return dict(sorted(side_by_side(work, names, 1)))


def _limit(fitter: Fitter, site: Any, loss: float) -> float | None:
    W = fitter.skeleton.tensor(f"{site.name}.weight").float()
    problem = fitter.curvatures.problem(site, W)
    inputs = torch.linalg.eigvalsh(problem.hessian.matrix).numpy()
    output = None
    if problem.output is not None:
        output = torch.linalg.eigvalsh(problem.output.matrix).numpy()
    variance = float(W.double().square().mean())
    limit = waterfilling_bits(variance, output, inputs, site.shape, loss)
    return limit if limit < float("inf") else None
