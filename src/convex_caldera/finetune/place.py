"""Put tunable layers into a model or a block, and find everything in it that is trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from convex_caldera.core.terms import CompressedLayer
from convex_caldera.finetune.parts import Tuned, Wish, as_stored
from convex_caldera.finetune.tunable import TunableLinear
from convex_caldera.models.parameters import device_of

Values = dict[str, Tensor]  # what training found: full name -> value as stored


def replace_layers(
    model: nn.Module,
    layers: Mapping[str, CompressedLayer],
    wish: Wish,
    seed: int,
    cached: bool,
    prefix: str = "",
) -> dict[str, TunableLinear]:
    """Put tunable layers in the place of the named modules, in place; nothing else trains then.

    `prefix` completes the names of layers, which their randomness depends on.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    placed = {}
    for name, layer in layers.items():
        old = model.get_submodule(name)
        new = TunableLinear(prefix + name, layer, getattr(old, "bias", None), wish, seed, cached)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent) if parent else model, child, new)
        placed[name] = new.to(device_of(old))
    return placed


def norm_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weights and biases of normalization layers by name: modules whose class says so."""
    return {
        f"{name}.{key}" if name else key: parameter
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        for key, parameter in module.named_parameters(recurse=False)
    }


class Trained:
    """All tensors in training of one model or block.

    Names are `<layer>.<tensor>` for tunable layers and the parameters' own for norms.
    """

    def __init__(
        self,
        layers: Mapping[str, TunableLinear],
        norms: Mapping[str, nn.Parameter],
        norm_dtypes: Mapping[str, torch.dtype],
    ):
        self.layers = dict(layers)
        self.norms = tuple(norms)
        self.tensors: dict[str, Tuned] = {
            f"{name}.{key}": each
            for name, layer in layers.items()
            for key, each in layer.tuned.items()
        }
        for name, parameter in norms.items():
            parameter.requires_grad_(True)
            self.tensors[name] = Tuned(parameter, 1.0, norm_dtypes[name])

    def __len__(self) -> int:
        return len(self.tensors)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """phi of every tensor, in the order of the names given."""
        return [each.phi for each in self.tensors.values()]

    def values(self) -> Values:
        """Every tensor as it would be stored now."""
        return {name: each.stored() for name, each in self.tensors.items()}

    def assign(self, values: Mapping[str, Tensor]) -> None:
        """Go on from these values; names that are not given stay."""
        for name, value in values.items():
            self.tensors[name].assign(value)

    @contextmanager
    def as_stored(self) -> Iterator[None]:
        """Compute with exactly what would be written now."""
        with as_stored(list(self.tensors.values())):
            for layer in self.layers.values():
                layer.storing = True
            try:
                yield
            finally:
                for layer in self.layers.values():
                    layer.storing = False
