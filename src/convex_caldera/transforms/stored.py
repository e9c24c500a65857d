"""Checks shared by the transforms: shapes that are given, and tensors that are read from a file."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from convex_caldera.errors import FormatError, ShapeError

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def check_stored(kind: str, tensors: Mapping[str, Tensor], layout: Layout) -> None:
    """Raises FormatError unless exactly the tensors of the layout are there."""
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    if found != layout:
        raise FormatError(
            f"{kind} transform: stored tensors are {found}, expected {layout}; "
            "the file is damaged or written by another version"
        )


def check_shape(kind: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Raises ShapeError unless a matrix given to a transform has the shape it is fitted for."""
    if tuple(found) != tuple(expected):
        raise ShapeError(f"{kind} transform: fitted for {tuple(expected)}, got {tuple(found)}")
