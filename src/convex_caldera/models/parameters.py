"""The places where a module keeps its parameters, and stand-ins that cost no memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from convex_caldera.models.aliases import RENAMED

# Any finite value does: stand-ins only show which tensor flows where.
_STAND_IN_VALUE = 0.01


@dataclass(frozen=True, eq=False)
class Slot:
    """One parameter by its full name, and the module that holds it."""

    name: str
    owner: nn.Module
    key: str

    @property
    def parameter(self) -> nn.Parameter:
        return self.owner._parameters[self.key]  # type: ignore[return-value]

    def put(self, parameter: nn.Parameter) -> None:
        self.owner._parameters[self.key] = parameter


def slots(module: nn.Module, prefix: str = "") -> Iterator[Slot]:
    """Every parameter inside `module`, tied ones once per place."""
    for name, owner in module.named_modules(prefix=prefix):
        for key, parameter in owner._parameters.items():
            if parameter is not None:
                yield Slot(f"{name}.{key}" if name else key, owner, key)


def answer_to(model: nn.Module, alias: str, name: str) -> None:
    """Let `model.get_submodule(alias)` give the module `name`; nothing is registered twice."""
    *parents, last = alias.split(".")
    here: nn.Module = model
    for part in parents:
        if not hasattr(here, part):
            here.__dict__[part] = nn.Module()
        here = getattr(here, part)
    here.__dict__[last] = model.get_submodule(name)


def answer_to_old_names(model: nn.Module) -> None:
    """Let a vision-language model answer to the names that its files keep."""
    if not hasattr(getattr(model, "config", None), "vision_config"):
        return
    for new, old in RENAMED:
        here: nn.Module | None = model
        for part in new.strip(".").split("."):
            here = getattr(here, part, None)
        if here is not None and not hasattr(model, old.partition(".")[0]):
            answer_to(model, old.strip("."), new.strip("."))


def device_of(model: nn.Module) -> torch.device:
    """Where the model computes: the device of anything in it that has data, else the CPU."""
    for tensor in (*model.parameters(), *model.buffers()):
        if not tensor.is_meta:
            return tensor.device
    return torch.device("cpu")


@contextmanager
def stand_ins(model: nn.Module) -> Iterator[None]:
    """Give every meta parameter one repeated value (stride 0), so that the model can run."""
    device = device_of(model)
    replaced = [(slot, slot.parameter) for slot in slots(model) if slot.parameter.is_meta]
    try:
        for slot, meta in replaced:
            value = torch.full((), _STAND_IN_VALUE, dtype=meta.dtype, device=device)
            slot.put(nn.Parameter(value.expand(meta.shape), requires_grad=False))
        yield
    finally:
        for slot, meta in replaced:
            slot.put(meta)
