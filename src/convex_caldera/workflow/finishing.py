"""The last step: from finished layers to a model directory that explains itself."""

from __future__ import annotations

import hashlib
from typing import Any

from convex_caldera.models.embeddings import EmbeddingSite, copies_of
from convex_caldera.storage.card import CardFacts
from convex_caldera.storage.partial import PartialRun
from convex_caldera.storage.read import Container
from convex_caldera.storage.write import assemble, provenance_record
from convex_caldera.workflow.job import Job
from convex_caldera.workflow.planning import Plan
from convex_caldera.workflow.settings import Settings


def finish(
    job: Job,
    plan: Plan,
    certificate: dict[str, Any] | None,
    run: PartialRun,
    notes: dict[str, Any],
) -> Container:
    """Assemble the directory; nothing in it depends on time, place or machine."""
    names = [site.name for site in job.sites]
    settings = job.settings.published()
    fingerprints = {
        key: hashlib.sha256(value.encode()).hexdigest() for key, value in job.fingerprint().items()
    }
    return assemble(
        run,
        job.source,
        names,
        recipe={"run": settings},
        report={
            "method": job.settings.method,
            "curvature": job.curvature,
            **notes,
            "targets": job.targets,
            "budget_bytes": job.budget.compressed_bytes,
            "budget": job.budget.wording,
            "planned_bytes": plan.compressed_bytes,
            "whole_model_in_memory": job.skeleton.whole_model,
            **_embeddings(job),
            "layers": {name: run.record(name) for name in names},
        },
        provenance=provenance_record(job.source, settings=settings, fingerprint=fingerprints),
        card=CardFacts(
            base_model=settings["model"],
            method=job.settings.method,
            command=command_line(settings),
            calibration=_calibration_sentence(job),
            certificate="" if certificate is None else certificate["statement"],
            activations=job.settings.activations or "",
        ),
        certificate=certificate,
        activations=job.settings.activations,
        lossless=job.settings.lossless,
    )


def _embeddings(job: Job) -> dict[str, Any]:
    """Which layers are embeddings, with their uses; tensors that were their copies."""
    uses = {site.name: list(site.uses) for site in job.sites if isinstance(site, EmbeddingSite)}
    copies = copies_of(job.sites)
    return ({"embeddings": uses} if uses else {}) | ({"copies": copies} if copies else {})


def command_line(settings: dict[str, Any]) -> str:
    """The command that repeats a run, defaults left out."""
    parts = ["convex-caldera compress", str(settings["model"]), "-o OUT"]
    for key, value in settings.items():
        if key == "model" or value == Settings.model_fields[key].default:
            continue
        flag = "--" + key.replace("_", "-")
        if isinstance(value, bool):
            parts.append(flag)
        elif isinstance(value, tuple | list):
            parts += [f"{flag} {item}" for item in value]
        else:
            parts.append(f"{flag} {value}")
    return " ".join(parts)


def _calibration_sentence(job: Job) -> str:
    if job.diag_hessians is not None:
        return f"Diagonal Hessians of {job.diag_hessians.name}."
    if job.tokens is None:
        return "No calibration data: the method needs none."
    dataset = job.settings.published()["dataset"]
    text = f"{job.tokens.numel()} tokens of {dataset} in windows of {job.tokens.shape[1]}"
    return f"{text}." if job.images is None else f"{text}; {len(job.images)} images."
