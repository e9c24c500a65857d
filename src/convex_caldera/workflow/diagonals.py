"""Layers under diagonal Hessians of a file: H = diag(d), no calibration text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convex_caldera.calibrate.diagonal_file import diagonal_of, read_diagonal_hessians
from convex_caldera.calibrate.saved_curvature import DIAGONAL, CurvatureProvenance
from convex_caldera.core.hessian import Hessian
from convex_caldera.core.problem import Problem
from convex_caldera.models.checkpoint import hash_file
from convex_caldera.models.sites import Site
from convex_caldera.models.skeleton import Skeleton
from convex_caldera.workflow.collecting import kept_curvature


class DiagonalCurvatures:
    """Every layer under its own diagonal, (n,) float64; `file` and `digest` say where from."""

    smooths = False

    def __init__(self, diagonals: Mapping[str, Tensor], file: str, digest: str):
        self._diagonals, self._file, self._digest = diagonals, file, digest

    def problem(self, site: Site, W: Tensor) -> Problem:
        H = torch.diag(self._diagonals[site.name]).to(W.device)
        return Problem(W, Hessian(H, name=site.name), site.name)

    seen = problem

    def tokens(self, site: Site) -> int:
        """Zero: the file does not say how many it has seen."""
        del site
        return 0

    def notes(self) -> dict[str, Any]:
        return {"diag_hessians": {"file": self._file, "sha256": self._digest}}


def diagonal_curvatures(
    file: Path, skeleton: Skeleton, sites: Sequence[Site], folder: Path
) -> DiagonalCurvatures:
    """The diagonals of a file, kept in `folder` by layer for a checker that reads no pickle.

    Raises:
        FormatError, NumericalError: the file is not one of diagonal Hessians.
        RecipeError: a layer has no entry; ShapeError: one of another width. Both name it.
        ResumeError: the folder holds the curvature of another model or file.
    """
    digest = hash_file(file)
    provenance = CurvatureProvenance(
        "diagonal", skeleton.checkpoint.fingerprint, digest, "float64", 0
    )

    def make() -> dict[str, dict[str, Tensor]]:
        shapes = {site.name: site.shape for site in sites}
        found = diagonal_of(shapes, read_diagonal_hessians(file), file.name)
        return {name: {DIAGONAL: values} for name, values in found.items()}

    parts = kept_curvature(folder, provenance, sites, make)
    diagonals = {name: part[DIAGONAL] for name, part in parts.items()}
    return DiagonalCurvatures(diagonals, file.name, digest)
