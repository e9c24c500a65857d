"""The compressed model on disk, seen through the names of a transformers model's modules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor, nn

from convex_caldera.core.terms import CompressedLayer
from convex_caldera.errors import FormatError
from convex_caldera.finetune.place import norm_weights
from convex_caldera.models.embeddings import embedding_modules
from convex_caldera.models.meta import load_config, meta_model
from convex_caldera.models.sites import find_blocks
from convex_caldera.runtime.names import own_name
from convex_caldera.storage.read import Container
from convex_caldera.storage.shard import DTYPES


class StoredModel:
    """Layers and norms of an opened output directory by their names in the model.

    Attributes:
        container: the directory.
        blocks_name: the module list of the decoder blocks.
        layer_names: module -> name of the compressed layer in the files.
        embedding_names: the same of embeddings, which are not trained.
        norm_names: parameter of a normalization layer -> name of its tensor in the files.

    Raises:
        FormatError: the directory holds a layer that its model has not.
    """

    def __init__(self, container: Container):
        self.container = container
        model = meta_model(load_config(container.directory), torch.float32)
        self.blocks_name = find_blocks(model)[0]
        parameters = dict(model.named_parameters(remove_duplicate=False))
        embeddings = set(embedding_modules(model).values())
        self.layer_names: dict[str, str] = {}
        self.embedding_names: dict[str, str] = {}
        for stored in container.layers:
            own = own_name(model, f"{stored}.weight", parameters)
            if own is None:
                raise FormatError(f"{stored}: the model has no such layer")
            module = own.removesuffix(".weight")
            names = self.embedding_names if module in embeddings else self.layer_names
            names[module] = stored
        norms = norm_weights(model)
        named = ((own_name(model, stored, parameters), stored) for stored in container.rest)
        self.norm_names = {own: stored for own, stored in named if own is not None and own in norms}

    def layers(self, prefix: str = "") -> dict[str, CompressedLayer]:
        """Module name -> layer, of all modules below a prefix."""
        return {
            module: self.container.layer(stored)
            for module, stored in sorted(self.layer_names.items())
            if module.startswith(prefix)
        }

    def embeddings(self) -> dict[str, Tensor]:
        """Parameter name -> decoded weight, of compressed embeddings."""
        return {
            f"{module}.weight": self.container.layer(stored).decode()
            for module, stored in self.embedding_names.items()
        }

    def norms(self, prefix: str = "") -> dict[str, Tensor]:
        """Parameter name -> stored value, of the normalization layers below a prefix."""
        found = sorted(self.norm_names.items())
        return {own: self.container.tensor(name) for own, name in found if own.startswith(prefix)}

    @cached_property
    def norm_dtypes(self) -> dict[str, torch.dtype]:
        """Parameter name -> dtype in the files."""
        info = self.container.rest_info
        return {own: DTYPES[info(stored).dtype] for own, stored in self.norm_names.items()}

    @property
    def num_weights(self) -> int:
        """Weights of all compressed layers but embeddings."""
        layers = self.container.layers
        specs = [layers[stored][1] for stored in self.layer_names.values()]
        return sum(spec["shape"][0] * spec["shape"][1] for spec in specs)


@contextmanager
def with_values(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Some parameters of a model at other values while the context lasts."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    kept = {name: parameters[name].data for name in values}
    try:
        for name, value in values.items():
            parameters[name].data = value.to(kept[name])
        yield
    finally:
        for name, data in kept.items():
            parameters[name].data = data
