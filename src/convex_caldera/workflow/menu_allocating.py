"""Allocation among options that differ in kind: every matrix gets the code that suits it.

    measure    every option of a method's menu, layer by layer, with the real quantizer
    decide     one option per layer by its measured loss under the byte budget, with a bound
    store      the options chosen, which were fitted already

No rate model is needed, since nothing is proposed: the menu near the budget's rate is measured
whole. The certificate is that of `allocating`, without a surrogate.
"""

from __future__ import annotations

import math

from convex_caldera.errors import RecipeError
from convex_caldera.workflow.certifying import certificate_of
from convex_caldera.workflow.compression import Compression, Outcome
from convex_caldera.workflow.deciding import decide
from convex_caldera.workflow.distortion_unit import unit_of
from convex_caldera.workflow.job import Job
from convex_caldera.workflow.operating_points import (
    Candidate,
    Menus,
    OperatingPoints,
    measured_on_disk,
)
from convex_caldera.workflow.planning import ties_of, wishes_of


def allocate_menu(compression: Compression) -> Outcome:
    """The plan, stored layer by layer, and its certificate.

    Raises:
        RecipeError: the method has no menu, or the curvature is guided.
        InfeasibleBudgetError: no plan of the options measured is within the budget.
    """
    job = compression.job
    if job.curvature == "guided":
        raise RecipeError(f"{job.method.name} takes no guided curvature; choose kronecker or input")
    menus = menus_of(job)
    with measured_on_disk(compression) as kept:
        points = OperatingPoints(compression, kept, unit_of(job))
        points.measure(menus, "measure")
        ties = ties_of(job.settings.tie, job.sites)
        decision = decide(job, menus, points.curves(menus, ties))
        points.store(decision.integer.choice)
        return Outcome(decision.plan, certificate_of(points, decision))


def menus_of(job: Job) -> Menus:
    """The method's options for every layer of a job, near its budget's rate.

    Raises:
        RecipeError: the method has no menu.
    """
    if job.method.menu is None:
        raise RecipeError(f"{job.method.name} has no menu")
    weights = sum(math.prod(site.shape) for site in job.sites)
    target = 8 * job.budget.compressed_bytes / weights
    menus = {}
    for site in job.sites:
        recipes = job.method.menu(site.shape, wishes_of(job.settings, site.name), target)
        menus[site.name] = [Candidate(label, recipe) for label, recipe in recipes.items()]
    return menus
