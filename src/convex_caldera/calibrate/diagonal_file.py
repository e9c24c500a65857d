"""diag_Hessians.pt: a dict of diagonal Hessians, read without running what is in it.

The mission's first scripts saved E[x_j^2] of every layer's inputs as a torch file: a plain dict,
module path -> 1-D tensor of in_features. Such a file is a pickle; torch's restricted unpickler
(weights_only) builds tensors and plain containers and refuses everything else. Module paths have
changed since, so keys are looked up by their aliases.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from convex_caldera.errors import FormatError, NumericalError, RecipeError, ShapeError
from convex_caldera.linalg.finite import all_finite
from convex_caldera.models.aliases import known_alias

# What torch's unpickler raises on a file that is refused, cut short or no torch file at all.
_DAMAGED = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    ValueError,
    KeyError,
    IndexError,
    AttributeError,
    TypeError,
)


def read_diagonal_hessians(path: Path) -> dict[str, Tensor]:
    """Every entry of the file as it is, float64.

    Raises:
        FormatError: not a torch file, holds anything but tensors under names, or asks to run code.
        NumericalError: an entry is negative, NaN or infinite.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except _DAMAGED as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FormatError(f"{path} is not a file of plain tensors: {first}") from error
    if not isinstance(content, dict) or not content:
        raise FormatError(f"{path} must hold a dict of tensors, not {type(content).__name__}")
    return {str(name): _diagonal(path, name, value) for name, value in content.items()}


def diagonal_of(
    layers: Mapping[str, tuple[int, int]], diagonals: Mapping[str, Tensor], where: str = "file"
) -> dict[str, Tensor]:
    """The diagonal of each layer, found under any of its names.

    Args:
        layers: name -> (out_features, in_features).
        diagonals: of `read_diagonal_hessians`.
        where: the file's name, for messages.

    Raises:
        RecipeError: a layer has no entry; counts those that lack one.
        ShapeError: an entry is of another width.
    """
    keys = {name: known_alias(name, diagonals) for name in layers}
    missing = [name for name, key in keys.items() if key is None]
    if missing:
        raise RecipeError(
            f"{where} has no diagonal for {missing[0]} ({len(missing)} of {len(layers)} layers); "
            f"it has {len(diagonals)} entries such as {next(iter(diagonals), '(none)')}"
        )
    found = {name: diagonals[key] for name, key in keys.items() if key is not None}
    for name, diagonal in found.items():
        if len(diagonal) != layers[name][1]:
            raise ShapeError(
                f"{where}: {keys[name]} has {len(diagonal)} entries but {name} reads "
                f"{layers[name][1]} inputs"
            )
    return found


def _diagonal(path: Path, name: object, value: object) -> Tensor:
    if not isinstance(name, str) or not isinstance(value, Tensor) or value.dim() != 1:
        raise FormatError(f"{path}: entry {name!r:.80} is not a 1-D tensor under a name")
    values = value.double()
    if not all_finite(values) or (values < 0).any():
        raise NumericalError(f"{path}: {name} has NaN, infinite or negative entries")
    return values
