"""The mean of two measurements of one layer's curvature."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from convex_caldera.calibrate.curvature import Curvature
from convex_caldera.calibrate.curvature_guided import GuidedCurvature

C = TypeVar("C", Curvature, GuidedCurvature)


def averaged(a: C, b: C) -> C:
    """The curvature of the mean of two losses: of two models, or of two draws of labels.

    Input sides are in nats and have the mean of both. Output sides O_i have mean diagonal one and
    belong to G G^T of energies e_i ~ tr H_i, hence (tr H_a O_a + tr H_b O_b) / (tr H_a + tr H_b).
    """
    if isinstance(a, GuidedCurvature):
        groups = tuple((x + y) / 2 for x, y in zip(a.groups, b.groups, strict=True))
        return replace(a, groups=groups)
    shares = [float(c.input.diagonal().sum()) for c in (a, b)]
    total = sum(shares) or 1.0
    output = (shares[0] * a.output + shares[1] * b.output) / total if sum(shares) else a.output
    return replace(a, input=(a.input + b.input) / 2, output=output)
