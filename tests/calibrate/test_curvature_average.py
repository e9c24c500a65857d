"""The mean of two curvatures is the curvature of both samples together."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from convex_caldera.calibrate.curvature import Curvature
from convex_caldera.calibrate.curvature_average import averaged
from convex_caldera.calibrate.curvature_guided import GuidedCurvature


def curvature_of(gradients: torch.Tensor) -> Curvature:
    """By the definition, T = 1: gradients (sequences, m, n)."""
    count, m, _ = gradients.shape
    H = torch.einsum("smi,smj->ij", gradients, gradients) / (count * 2 * m)
    outer = torch.einsum("sin,sjn->ij", gradients, gradients)
    energy = float(gradients.square().sum()) or 1.0
    return Curvature(H, outer * (m / energy), count)


@given(st.integers(0, 2**16), st.integers(1, 5), st.integers(1, 4), st.floats(0, 3))
@settings(max_examples=30, deadline=None)
def test_averaged_is_the_curvature_of_both_samples(
    seed: int, m: int, n: int, louder: float
) -> None:
    draw = torch.Generator().manual_seed(seed)
    first = torch.randn(3, m, n, generator=draw, dtype=torch.float64)
    second = louder * torch.randn(3, m, n, generator=draw, dtype=torch.float64)
    found = averaged(curvature_of(first), curvature_of(second))
    whole = curvature_of(torch.cat([first, second]))
    torch.testing.assert_close(found.input, whole.input)
    torch.testing.assert_close(found.output, whole.output)


def test_averaged_groups_are_averaged_one_by_one() -> None:
    a = GuidedCurvature((torch.eye(2), 2 * torch.eye(2)), 4, 3)
    b = GuidedCurvature((3 * torch.eye(2), torch.zeros(2, 2)), 4, 3)
    found = averaged(a, b)
    torch.testing.assert_close(found.groups[0], 2 * torch.eye(2))
    torch.testing.assert_close(found.groups[1], torch.eye(2))


def test_averaged_of_nothing_stays_nothing() -> None:
    nothing = Curvature(torch.zeros(2, 2), torch.eye(3), 1)
    found = averaged(nothing, nothing)
    assert not found.input.any() and torch.equal(found.output, torch.eye(3))
