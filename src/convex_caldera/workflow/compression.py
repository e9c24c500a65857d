"""One compression under way: what is asked, who fits it, where its layers are kept; its outcome."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from convex_caldera.storage.partial import PartialRun
from convex_caldera.workflow.fitting import Fitter
from convex_caldera.workflow.job import Job
from convex_caldera.workflow.planning import Plan
from convex_caldera.workflow.progress import Progress


@dataclass(frozen=True)
class Compression:
    """A job being done.

    Args:
        job: what is asked.
        fitter: the model, its curvatures and the seed.
        run: where finished layers are kept.
        progress: told of every finished step.
        workers: layers fitted at a time; does not change the result.
        measured: where options are kept for other budgets too, if anywhere.
    """

    job: Job
    fitter: Fitter
    run: PartialRun
    progress: Progress
    workers: int
    measured: Path | None = None


@dataclass(frozen=True)
class Outcome:
    """What came of it: the plan carried out, its certificate if any, notes for the report."""

    plan: Plan
    certificate: dict[str, Any] | None = None
    notes: dict[str, Any] = field(default_factory=dict)
