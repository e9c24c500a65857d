"""Invertible changes of coordinates of a problem (W, H); each file is one of them.

TABLE is the closed set of transforms a recipe or a file may name, by their `kind`.
"""

from __future__ import annotations

from convex_caldera.core.protocols import Transform
from convex_caldera.transforms.diagonal import Diagonal
from convex_caldera.transforms.hadamard import RandomizedHadamard
from convex_caldera.transforms.permute import ActOrder
from convex_caldera.transforms.scale import ColumnScale

TABLE: dict[str, type[Transform]] = {
    "diagonal": Diagonal,
    "hadamard": RandomizedHadamard,
    "permute": ActOrder,
    "scale": ColumnScale,
}

__all__ = ["TABLE", "ActOrder", "ColumnScale", "Diagonal", "RandomizedHadamard"]
