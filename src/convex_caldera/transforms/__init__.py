"""Transforms: invertible changes of coordinates of a problem; `TABLE` finds them by kind."""

from __future__ import annotations

from convex_caldera.core.protocols import Transform
from convex_caldera.transforms.hadamard import RandomizedHadamard

TABLE: dict[str, type[Transform]] = {"hadamard": RandomizedHadamard}

__all__ = ["TABLE", "RandomizedHadamard"]
