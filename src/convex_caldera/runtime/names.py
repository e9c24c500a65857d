"""From the name of a tensor in a file to its name in a model, as transformers loads it."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from torch import nn


def own_name(model: nn.Module, stored: str, known: Container[str]) -> str | None:
    """The element of `known` that `stored` stands for in this model, or None.

    Tried in turn: the name itself; with or without the prefix of the base model ("model."); the
    renamings that transformers applies to old checkpoints of this architecture.
    """
    for name in _prefixed(model, stored):
        if name in known:
            return name
    for name in _prefixed(model, _renamed(model, stored)):
        if name in known:
            return name
    return None


def _prefixed(model: nn.Module, name: str) -> tuple[str, str, str]:
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    return name, name.removeprefix(prefix), prefix + name


def _renamed(model: Any, name: str) -> str:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    return rename_source_key(name, renamings, [])[0]
