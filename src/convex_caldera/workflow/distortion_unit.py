"""What a layer's loss counts for in a plan, so that losses of different layers add up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from convex_caldera.workflow.curvatures import GRADIENT_KINDS
from convex_caldera.workflow.job import Job

# Of a fit's record: its own scale, where it has one (`workflow.embedding_scales`).
SCALE = "scale"


@dataclass(frozen=True)
class DistortionUnit:
    """Nats of KL per token where the curvature is that of the model's loss, else relative loss.

    Nats are multiplied by a fit's own scale, or its layer's, 1 if it has none
    (`workflow.held_out`).
    """

    name: Literal["nats", "relative"]
    scale: Mapping[str, float] = field(default_factory=dict)

    def of(self, layer: str, record: Mapping[str, Any]) -> float:
        """The distortion of a fit, from its record."""
        if self.name == "nats":
            return float(record["loss"]) * self.scale_of(layer, record)
        return float(record["relative_loss"])

    def scale_of(self, layer: str, record: Mapping[str, Any]) -> float:
        """What the loss of a fit is multiplied by."""
        own: float = record.get(SCALE, self.scale.get(layer, 1.0))
        return own


def unit_of(job: Job) -> DistortionUnit:
    """The unit that the job's curvature allows, unscaled."""
    return DistortionUnit("nats" if job.curvature in GRADIENT_KINDS else "relative")
