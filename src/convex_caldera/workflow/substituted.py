"""A model run with other weights than its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from convex_caldera.errors import ModelError


class Substituted(nn.Module):
    """A model in whose forward pass some weights are others; the model itself is not altered."""

    def __init__(self, model: nn.Module, values: Mapping[str, Callable[[], Tensor]]):
        super().__init__()
        self.model, self._values = model, dict(values)
        self.config = model.config

    def forward(self, **inputs: Any) -> Any:
        changed = {weight: self._fitting(weight) for weight in self._values}
        return torch.func.functional_call(self.model, changed, (), inputs)

    def _fitting(self, weight: str) -> Tensor:
        old = self.model.get_parameter(weight)
        value = self._values[weight]().to(old)
        if value.shape != old.shape:
            raise ModelError(
                f"{weight}: {tuple(value.shape)} compressed, {tuple(old.shape)} in the model"
            )
        return value


def always(value: Tensor) -> Callable[[], Tensor]:
    """A value that is at hand, as `Substituted` asks for it."""
    return lambda: value
