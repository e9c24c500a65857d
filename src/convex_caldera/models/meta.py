"""Build a causal language model from its configuration, without weights.

As transformers builds it, except that every `torch.empty` without a device (where all large
parameters come from) makes a tensor without data. Buffers computed on the way, such as rotary
frequencies, are therefore real, no parameter costs memory or time, and no random state moves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from convex_caldera.errors import ModelError
from convex_caldera.models.architectures import auto_class
from convex_caldera.models.parameters import slots

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class _EmptyOnMeta(TorchFunctionMode):
    """Sends `torch.empty` to the meta device unless the caller names one."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        if func is torch.empty and options.get("device") is None:
            options["device"] = "meta"
        return func(*args, **options)


def load_config(path: Path) -> PretrainedConfig:
    """The configuration of a model directory.

    Raises:
        ModelError: it is not readable, or of an architecture that transformers does not know.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except (ValueError, KeyError, OSError, TypeError) as error:
        raise ModelError(f"{path}: cannot use config.json: {_first_line(error)}") from error


def meta_model(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A language model in evaluation mode: meta parameters, real buffers, ties kept.

    A model that reads images too is built whole, with its vision tower.

    Raises:
        ModelError: the configuration is of no causal language model, asks for code of its own,
            or leads to a buffer that depends on the weights.
    """
    try:
        with _EmptyOnMeta():
            model = auto_class(config).from_config(config, dtype=dtype, trust_remote_code=False)
    except ValueError as error:
        raise ModelError(
            f"a model of type {config.model_type!r} cannot be built as a causal language model: "
            f"{_first_line(error)}"
        ) from error
    _parameters_to_meta(model)
    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            raise ModelError(f"buffer {name} of {type(model).__name__} cannot be computed alone")
    return model.eval().requires_grad_(False)


def _parameters_to_meta(model: nn.Module) -> None:
    """Small parameters made by other means (norms are `torch.ones`) lose their data too."""
    moved: dict[int, nn.Parameter] = {}
    for slot in slots(model):
        old = slot.parameter
        if not old.is_meta:
            new = moved.setdefault(id(old), nn.Parameter(old.detach().to("meta"), False))
            slot.put(new)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
