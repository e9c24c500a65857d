"""A model run with other weights than its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from convex_caldera.errors import ModelError
from convex_caldera.runtime.names import own_name


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


@contextmanager
def exchanged(model: nn.Module, layers: Mapping[str, Tensor]) -> Iterator[None]:
    """The model itself with other weights inside, for passes that look at its modules.

    Args:
        layers: name in the file -> weight (m, n).

    Raises:
        ModelError: the model as it was loaded has no weight of that name.

    Memory: the weights exchanged once more.
    """
    known = dict(model.named_parameters(remove_duplicate=False))
    kept: dict[str, Tensor] = {}
    try:
        for name, W in layers.items():
            weight = own_name(model, f"{name}.weight", known)
            if weight is None:
                raise ModelError(f"{name}: the model as it was loaded has no such weight")
            kept[weight] = known[weight].detach().clone()
            _fill(known[weight], W)
        yield
    finally:
        for weight, W in kept.items():
            _fill(known[weight], W)


def _fill(parameter: Tensor, W: Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(W)
