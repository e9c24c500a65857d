"""What a compression made, in figures that scripts rely on and in words."""

from __future__ import annotations

import resource
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from convex_caldera.storage.read import Container
from convex_caldera.workflow.compression import Outcome
from convex_caldera.workflow.curvatures import GRADIENT_KINDS
from convex_caldera.workflow.job import Job
from convex_caldera.workflow.precision import code_bits, precision_label


@dataclass(frozen=True)
class Summary:
    """What a compression made, measured from the files written."""

    output: str
    method: str
    file_bytes: int
    original_bytes: int
    bits_per_compressed_weight: float
    bits_per_weight: float
    compressed_weights: int
    budget_bytes: int
    layers: int
    resumed_layers: int
    whole_model_in_memory: bool
    calibration_tokens: int
    mean_relative_loss: float
    allocation: dict[str, Any] | None
    precision: str
    activations: str | None
    seconds: float
    peak_memory_bytes: int
    input_curvature_only: tuple[str, ...] = ()
    lossless_saved_bytes: int = 0
    expected_kl: float | None = None
    held_out_kl: float | None = None
    held_out_kl_stderr: float | None = None
    remeasured: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        record = asdict(self)
        record["num_layers"] = record.pop("layers")
        allocation = record.pop("allocation") or {}
        return {**record, **allocation}

    def text(self) -> str:
        ratio = self.original_bytes / self.file_bytes
        lines = [
            f"{self.method}: {self.layers} layers, {self.compressed_weights:,} weights"
            + (f" ({self.resumed_layers} resumed)" if self.resumed_layers else ""),
            f"{self.file_bytes:,} bytes of weight files ({ratio:.2f}x smaller), "
            f"{self.bits_per_compressed_weight:.4f} bits per compressed weight, "
            f"{self.bits_per_weight:.4f} per all weights",
            f"{self.precision}, mean relative loss {self.mean_relative_loss:.5f}, "
            f"{self.seconds:.1f} s, "
            f"peak memory {self.peak_memory_bytes / 1e6:.0f} MB -> {self.output}",
        ]
        return "\n".join([*lines, *self._losses(), *self._notes()])

    def _losses(self) -> list[str]:
        """What the plan said, and what the windows held out say."""
        lines = []
        if self.allocation is not None:
            plan, gap = self.allocation, 100 * (self.allocation["plan_gap"] or 0.0)
            lines.append(
                f"plan: predicted {plan['distortion']:.5f} {plan['unit']}, at most {gap:.3f} % "
                "above the best plan of the options measured"
            )
            if self.expected_kl is not None and self.expected_kl != plan["distortion"]:
                lines.append(f"KL expected of all layers together: {self.expected_kl:.5f} nats")
        if self.remeasured is not None:
            first, second = (self.remeasured[name]["kl"] for name in ("first", "second"))
            lines.append(
                f"curvature measured again: {first:.5f} nats held out before, {second:.5f} after; "
                f"the {self.remeasured['kept']} round was kept"
            )
        if self.held_out_kl is not None:
            error = "" if self.held_out_kl_stderr is None else f" ± {self.held_out_kl_stderr:.5f}"
            lines.append(
                f"KL on calibration windows held out: {self.held_out_kl:.5f}{error} nats per token"
            )
        return lines

    def _notes(self) -> list[str]:
        lines = []
        if self.lossless_saved_bytes:
            lines.append(f"{self.lossless_saved_bytes:,} bytes saved on tensors kept bit for bit")
        if self.whole_model_in_memory:
            lines.append("note: the original was held whole in memory")
        if self.input_curvature_only:
            lines.append(
                f"note: gradients vanish in {len(self.input_curvature_only)} layers, which were "
                "rounded under their inputs alone"
            )
        return lines


def summary_of(
    job: Job,
    outcome: Outcome,
    container: Container,
    out: Path,
    resumed: int,
    seconds: float,
) -> Summary:
    """The figures of what was written, `seconds` after the start."""
    plan, certificate = outcome.plan, outcome.certificate
    sizes, report = container.sizes(), container.report()
    records, together = report["layers"], report.get("held_out_kl", {})
    return Summary(
        output=str(out),
        method=job.settings.method,
        file_bytes=sizes.file_bytes,
        original_bytes=job.source.checkpoint.stored_bytes,
        bits_per_compressed_weight=sizes.bits_per_compressed_weight,
        bits_per_weight=sizes.bits_per_weight,
        lossless_saved_bytes=sizes.lossless_saved_bytes,
        compressed_weights=sizes.compressed_weights,
        budget_bytes=job.budget.compressed_bytes,
        layers=len(job.sites),
        resumed_layers=resumed,
        whole_model_in_memory=job.skeleton.whole_model or job.curvature in GRADIENT_KINDS,
        calibration_tokens=0 if job.tokens is None else job.tokens.numel(),
        mean_relative_loss=sum(r["relative_loss"] for r in records.values()) / len(records),
        allocation=None if certificate is None else _allocation_summary(certificate, records),
        precision=precision_label(map(code_bits, plan.recipes.values()), job.settings.activations),
        activations=job.settings.activations,
        seconds=seconds,
        peak_memory_bytes=peak_memory_bytes(),
        input_curvature_only=tuple(container.report().get("input_curvature_only", ())),
        expected_kl=report.get("expected_kl"),
        held_out_kl=together.get("kl"),
        held_out_kl_stderr=together.get("kl_stderr"),
        remeasured=report.get("remeasured"),
    )


def _allocation_summary(certificate: dict[str, Any], records: dict[str, Any]) -> dict[str, Any]:
    """The figures of the plan that scripts rely on."""
    plan, surrogate = certificate["plan"], certificate["surrogate"]
    return {
        "plan_gap": plan["plan_gap"],
        "price": plan["price"],
        "bound": plan["bound"],
        "distortion": plan["distortion"],
        "unit": certificate["unit"],
        "surrogate_gap": surrogate["gap"] if surrogate else None,
        "layers": {
            name: {
                "bits": records[name]["bits"],
                "rank": entry["rank"],
                "price": plan["price"],
                "distortion": entry["loss"],
            }
            for name, entry in certificate["layers"].items()
        },
    }


def peak_memory_bytes() -> int:
    """Largest resident set of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
