"""Our own way from a directory to a transformers model.

A skeleton is built with all parameters on the meta device (buffers are real, since rotary tables
and the like are not in any file), linear modules are replaced, and tensors are put in one by one.
Nothing of transformers' own loading is used, so this also checks it: both must agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convex_caldera.errors import FormatError, ModelError
from convex_caldera.models.meta import load_config, meta_model
from convex_caldera.runtime.late import embedding_layers
from convex_caldera.runtime.names import own_name
from convex_caldera.runtime.replace import replace_linears
from convex_caldera.storage.read import Container, open_container
from convex_caldera.storage.shard import read_tensor
from convex_caldera.storage.spec import PACKED, spec_layout


def load(
    directory: Path | str,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    verify: bool = True,
) -> Any:
    """Load a compressed model.

    Args:
        directory: an output directory.
        dtype: of embeddings, norms, biases and dense factors; None takes that of config.json.
        device: where to put it.
        verify: hash all files first; see `storage.open_container`.

    Returns:
        A transformers causal language model in evaluation mode whose compressed layers are
        `CompressedLinear`; a compressed embedding or head is decoded once, into a plain weight.
        It can be saved with `save_pretrained` and loaded again.

    Raises:
        FormatError: the directory is damaged or does not fit its own config.json.
        ModelError: transformers does not know the architecture.

    Cost: one pass over the files; memory of the stored tensors, plus one tensor, and embeddings
    as large as the original's.
    """
    container = open_container(directory, verify)
    model = meta_model(load_config(container.directory), _dtype(container, dtype))
    specs = {name: spec for name, (_, spec) in container.layers.items()}
    embeddings = embedding_layers(model, specs)
    replace_linears(model, {name: s for name, s in specs.items() if name not in embeddings})
    _fill(model, container, embeddings, torch.device(device))
    _require_filled(model, container)
    _finish(model, container)
    return model.to(device).eval()


def _dtype(container: Container, dtype: torch.dtype | str | None) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    text = container.config
    name = dtype or text.get("dtype") or text.get("torch_dtype") or "float32"
    found = getattr(torch, str(name), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ModelError(f"unknown dtype {name!r}; one of float32, bfloat16, float16")
    return found


def _fill(
    model: nn.Module, container: Container, embeddings: Mapping[str, str], device: torch.device
) -> None:
    expected = dict(model.state_dict(keep_vars=True))
    for name in container.rest:
        own = own_name(model, name, expected)
        if own is not None:  # the original may hold tensors that its model does not use
            _set(model, own, container.tensor(name).to(device), expected[own])
    for layer, own in embeddings.items():
        _set(model, own, container.layer(layer).decode().to(device), expected[own])
    for layer, (header, spec) in container.layers.items():
        if layer in embeddings:
            continue
        for field in spec_layout(spec):
            name = f"{layer}.{field}"
            own = own_name(model, name, expected)
            if own is None:
                raise FormatError(f"{header.path.name}: the model has no tensor {name!r}")
            _set(model, own, read_tensor(header, name).to(device), expected[own])


def _set(model: nn.Module, name: str, value: Tensor, old: Tensor) -> None:
    parent, _, field = name.rpartition(".")
    module = model.get_submodule(parent)
    if value.shape != old.shape:
        raise FormatError(f"{name}: {tuple(value.shape)} in the file, {tuple(old.shape)} expected")
    if field != PACKED and old.is_floating_point():
        value = value.to(old.dtype)
    if isinstance(old, nn.Parameter):
        value = nn.Parameter(value, requires_grad=value.is_floating_point())
    setattr(module, field, value)


def _require_filled(model: Any, container: Container) -> None:
    """Tie what is still empty to its partner; nothing may stay empty after that."""

    def empty() -> set[str]:
        tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
        return {name for name, tensor in tensors if tensor.is_meta}

    model.tie_weights(missing_keys=empty())
    left = sorted(empty())
    if left:
        raise FormatError(f"{container.directory.name}: no tensor for {left[0]!r}")


def _finish(model: Any, container: Container) -> None:
    """What transformers attaches to a loaded model: generation defaults and the quantizer."""
    from transformers import GenerationConfig

    from convex_caldera.runtime.hf import (
        ConvexCalderaConfig,
        ConvexCalderaQuantizer,
        apply_activations,
    )

    if (container.directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(container.directory)
    config = ConvexCalderaConfig(activations=container.activations)
    model.config.quantization_config = config
    model.hf_quantizer = ConvexCalderaQuantizer(config)
    model.is_quantized = True
    model.quantization_method = config.quant_method
    apply_activations(model, container.activations)
