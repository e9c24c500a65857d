"""Parameters that are decoded once, when a model is loaded, and plain from then on.

Embeddings that were compressed, and kept tensors that were coded losslessly: the file is small,
memory as the original's. transformers must be told not to miss them, nor to wonder at what stands
for them in the files; and tied parameters are tied when the values are in place, since it would
look for one of both in the files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convex_caldera.errors import FormatError
from convex_caldera.models.embeddings import embedding_modules
from convex_caldera.models.names import renamed
from convex_caldera.runtime.names import own_name
from convex_caldera.storage.layers import layer_specs
from convex_caldera.storage.lossless import SUFFIX, lossless_infos, read_lossless
from convex_caldera.storage.read import read_layer
from convex_caldera.storage.shard import Header, TensorInfo, bytes_as_tensor, read_header
from convex_caldera.storage.spec import Spec, spec_layout


@dataclass(frozen=True)
class Late:
    """What is to be filled in after loading.

    Attributes:
        values: parameter of the model -> what decodes it.
        coded: tensors of the files that stand for them, by their old and new names.
        present: parameters that the files hold as they are.
    """

    values: dict[str, Callable[[], Tensor]] = field(default_factory=dict)
    coded: set[str] = field(default_factory=set)
    present: set[str] = field(default_factory=set)


def embedding_layers(model: nn.Module, specs: Mapping[str, Spec]) -> dict[str, str]:
    """Stored layers that are an input embedding or an output head -> their parameter."""
    wanted = {f"{name}.weight" for name in embedding_modules(model).values()}
    found = {name: own_name(model, f"{name}.weight", wanted) for name in specs}
    return {name: own for name, own in found.items() if own is not None}


def late_tensors(model: nn.Module, files: Iterable[Path], embeddings: Mapping[str, str]) -> Late:
    """What the files of a checkpoint hold for later; nothing is decoded yet.

    Args:
        model: a skeleton.
        files: all shards.
        embeddings: see `embedding_layers`.
    """
    expected = set(model.state_dict())
    late = Late()
    for header in map(read_header, files):
        for name, info in (lossless_infos(header) or {}).items():
            late.coded.add(name + SUFFIX)
            own = own_name(model, name, expected)
            if own is not None:  # the original may hold tensors that its model does not use
                late.values[own] = _lossless(header, info)
        for layer, spec in layer_specs(header).items():
            if layer in embeddings:
                parts = {f"{layer}.{part}" for part in spec_layout(spec)}
                late.coded.update(parts, (renamed(model, part) for part in parts))
                late.values[embeddings[layer]] = _decoded(header, layer, spec)
        plain = (own_name(model, name, expected) for name in header.entries)
        late.present.update(own for own in plain if own is not None)
    return late


def expect(model: Any, late: Late) -> None:
    """Tell transformers, before it loads weights, what will come later."""
    pairs = {pair for pair in model.all_tied_weights_keys.items() if set(pair) & set(late.values)}
    model.all_tied_weights_keys = {
        target: source
        for target, source in model.all_tied_weights_keys.items()
        if (target, source) not in pairs
    }
    names = set(late.values) | {name for pair in pairs for name in pair} - late.present
    _ignore(model, "_keys_to_ignore_on_load_missing", names)
    _ignore(model, "_keys_to_ignore_on_load_unexpected", late.coded)


@torch.no_grad()
def fill(model: Any, late: Late) -> None:
    """Decode what was promised into the parameters as they were loaded, and tie them again."""
    tensors = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    for own, decode in late.values.items():
        value = decode()
        if tensors[own].shape != value.shape:
            raise FormatError(f"{own}: {tuple(value.shape)} in the file, the model differs")
        tensors[own].copy_(value)
    if late.values:
        pairs = model.get_expanded_tied_weights_keys(all_submodels=True)
        there = set(late.values) | late.present
        model.all_tied_weights_keys = pairs
        # Of two that are both stored and differ, neither takes the place of the other.
        model.tie_weights(missing_keys={name for pair in pairs.items() for name in pair} - there)


def _ignore(model: Any, attribute: str, names: Iterable[str]) -> None:
    before = set(getattr(model, attribute) or ())
    setattr(model, attribute, before | {f"^{re.escape(name)}$" for name in names})


def _lossless(header: Header, info: TensorInfo) -> Callable[[], Tensor]:
    return lambda: bytes_as_tensor(read_lossless(header, info), info)


def _decoded(header: Header, layer: str, spec: Spec) -> Callable[[], Tensor]:
    return lambda: read_layer(header, layer, spec).decode()
