"""Which tensor of a checkpoint belongs to which parameter of a model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from convex_caldera.errors import ModelError
from convex_caldera.models.aliases import aliases
from convex_caldera.models.checkpoint import Checkpoint
from convex_caldera.models.parameters import slots


@dataclass(frozen=True)
class NameMap:
    """Parameters and persistent buffers by their names in the checkpoint.

    Tied parameters have the same stored name. `missing` are parameters that the checkpoint has
    no tensor for, `unused` tensors that nothing asks for.
    """

    parameters: dict[str, str]
    buffers: dict[str, str]
    missing: tuple[str, ...]
    unused: tuple[str, ...]


def map_names(model: nn.Module, checkpoint: Checkpoint) -> NameMap:
    """Compare names directly, then with and without the prefix of the base model.

    Raises:
        ModelError: a tensor has another shape than its parameter.
    """
    groups: dict[int, list[str]] = {}
    for slot in slots(model):
        groups.setdefault(id(slot.parameter), []).append(slot.name)
    parameters: dict[str, str] = {}
    for names in groups.values():
        parameters |= _stored_names(names, model, checkpoint)
    persistent = set(model.state_dict(keep_vars=True)) - {slot.name for slot in slots(model)}
    found = {name: stored_name(name, model, checkpoint) for name in sorted(persistent)}
    buffers = {name: stored for name, stored in found.items() if stored is not None}
    missing = tuple(slot.name for slot in slots(model) if slot.name not in parameters)
    used = {*parameters.values(), *buffers.values()}
    _check_shapes(model, checkpoint, parameters | buffers)
    unused = tuple(name for name in checkpoint.names if name not in used)
    return NameMap(parameters, buffers, missing, unused)


def needs_conversion(model: nn.Module, checkpoint: Checkpoint) -> bool:
    """Whether transformers changes the values, not only the names, of some tensor on loading."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    patterns = [
        pattern
        for transform in get_model_conversion_mapping(model)
        if isinstance(transform, WeightConverter)
        for pattern in transform.source_patterns
    ]
    return any(re.search(pattern, name) for pattern in patterns for name in checkpoint.names)


def renamed(model: Any, name: str) -> str:
    """The tensor's name in the model, after the renamings of old checkpoints by transformers."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    return rename_source_key(name, renamings, [])[0]


def _stored_names(names: list[str], model: nn.Module, checkpoint: Checkpoint) -> dict[str, str]:
    """Stored names of one parameter that lives under `names` (several if tied)."""
    found = {name: stored_name(name, model, checkpoint) for name in names}
    present = {name: stored for name, stored in found.items() if stored is not None}
    if not present:
        return {}
    first = next(iter(present.values()))
    reference = checkpoint.tensor(first) if len(present) > 1 else None
    for stored in present.values():
        # A checkpoint that keeps two different tensors overrules a configuration that ties them.
        if reference is not None and not torch.equal(reference, checkpoint.tensor(stored)):
            return present
    return dict.fromkeys(names, first)


def stored_name(name: str, model: nn.Module, checkpoint: Checkpoint) -> str | None:
    """What a parameter is called in the checkpoint; None if it holds no tensor for it."""
    return next((c for c in _candidates(name, model) if c in checkpoint), None)


def _candidates(name: str, model: nn.Module) -> Iterator[str]:
    prefix = getattr(model, "base_model_prefix", "")
    yield from aliases(name)
    if prefix and name.startswith(f"{prefix}."):
        yield name.removeprefix(f"{prefix}.")
    elif prefix:
        yield f"{prefix}.{name}"


def _check_shapes(model: nn.Module, checkpoint: Checkpoint, names: dict[str, str]) -> None:
    wanted = {name: tuple(t.shape) for name, t in model.state_dict(keep_vars=True).items()}
    shapes = checkpoint.shapes()
    for name, stored in names.items():
        if shapes[stored] != wanted[name]:
            raise ModelError(
                f"{checkpoint.path}: {stored} is {shapes[stored]} but config.json asks for "
                f"{wanted[name]}; weights and configuration do not belong together"
            )
