"""From the name of a tensor in a file to its name in a model, as transformers loads it."""

from __future__ import annotations

from collections.abc import Container

from torch import nn

from convex_caldera.models.names import renamed


def own_name(model: nn.Module, stored: str, known: Container[str]) -> str | None:
    """The element of `known` that `stored` stands for in this model, or None.

    Tried in turn: the name itself; with or without the prefix of the base model ("model."); the
    renamings that transformers applies to old checkpoints of this architecture.
    """
    for name in _prefixed(model, stored):
        if name in known:
            return name
    for name in _prefixed(model, renamed(model, stored)):
        if name in known:
            return name
    return None


def _prefixed(model: nn.Module, name: str) -> tuple[str, str, str]:
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    return name, name.removeprefix(prefix), prefix + name
