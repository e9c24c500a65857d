"""Registration with transformers: `AutoModelForCausalLM.from_pretrained(dir)` just works.

Only the stable part of its interface is used: before weights are loaded, linear modules of the
meta skeleton are replaced by ones whose buffers and parameters are named as in the files. The
specs come from the files' own metadata. Importing this module registers; `runtime.hook` imports
it at the right time.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from convex_caldera.errors import FormatError, RecipeError

QUANT_METHOD = "convex_caldera"


class ConvexCalderaConfig(QuantizationConfigMixin):
    """`quantization_config` of a compressed model: method, format version, rounded activations."""

    def __init__(self, format_version: int = 1, activations: str | None = None, **unknown: Any):
        unknown.pop("quant_method", None)
        if unknown:
            raise FormatError(f"config.json: unknown quantization keys {sorted(unknown)}")
        self.quant_method = QUANT_METHOD
        self.format_version = format_version
        self.activations = activations

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        record = {"quant_method": self.quant_method, "format_version": self.format_version}
        return record if self.activations is None else {**record, "activations": self.activations}


class ConvexCalderaQuantizer(HfQuantizer):
    """Loads, saves and dequantizes compressed models within transformers."""

    requires_calibration = True

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        from convex_caldera.storage.layers import FORMAT_VERSION

        version = self.quantization_config.format_version
        if version != FORMAT_VERSION:
            raise FormatError(f"format version {version!r}; this program reads {FORMAT_VERSION}")

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Iterable[str] | None = None, **kwargs: Any
    ) -> Any:
        from convex_caldera.runtime.late import embedding_layers, expect, late_tensors
        from convex_caldera.runtime.replace import replace_linears

        files = [Path(file) for file in checkpoint_files or ()]
        specs = specs_of_files(files)
        embeddings = embedding_layers(model, specs)
        linears = {n: spec for n, spec in specs.items() if n not in embeddings}
        leave_children_alone(model, replace_linears(model, linears))
        self._late = late_tensors(model, files, embeddings)
        expect(model, self._late)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from convex_caldera.runtime.late import fill
        from convex_caldera.runtime.linear import CompressedLinear

        for module in model.modules():
            if isinstance(module, CompressedLinear):
                module.settle()
        fill(model, self._late)
        apply_activations(model, self.quantization_config.activations)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        from convex_caldera.runtime.linear import CompressedLinear

        for name, module in list(model.named_modules()):
            if isinstance(module, CompressedLinear):
                parent, _, child = name.rpartition(".")
                plain = module.dequantize(dtype or model.config.dtype)
                setattr(model.get_submodule(parent) if parent else model, child, plain)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, str]]:
        from convex_caldera.runtime.linear import CompressedLinear
        from convex_caldera.storage.layers import shard_metadata

        specs = {
            name: module.spec
            for name, module in model.named_modules()
            if isinstance(module, CompressedLinear)
        }
        return None, shard_metadata(specs, explicit_names=True)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def leave_children_alone(model: Any, replaced: Iterable[str]) -> None:
    """Keep transformers from initializing compressed layers by way of their parents.

    Some models (SigLIP) set the weights of a module's linear children, which compressed layers have
    not. A parent with parameters of its own is left as it is.
    """
    for name in replaced:
        parent = model.get_submodule(name.rpartition(".")[0])
        if not parent._parameters:
            parent._is_hf_initialized = True


def apply_activations(model: Any, text: str | None) -> None:
    """Round activations as the `activations` of a quantization_config say; None leaves them."""
    if text is not None:
        from convex_caldera.recipes.activations import parse_activations
        from convex_caldera.runtime.attention import round_activations

        round_activations(model, parse_activations(text))


def specs_of_files(files: Iterable[Path]) -> dict[str, Any]:
    """Specs of all layers of a checkpoint, every tensor checked to be there.

    Raises FormatError if the files hold no compressed layer, or do not fit their own metadata.
    """
    from convex_caldera.storage.layers import check_layer_tensors, layer_specs
    from convex_caldera.storage.shard import read_header

    specs: dict[str, Any] = {}
    infos: dict[str, Any] = {}
    for path in files:
        header = read_header(path)
        specs.update(layer_specs(header))
        infos.update({name: entry.info for name, entry in header.entries.items()})
    if not specs:
        raise FormatError("config.json names convex_caldera, but no file holds compressed layers")
    for name, spec in specs.items():
        check_layer_tensors(name, spec, infos)
    return specs


def register() -> None:
    """Add our method to transformers' tables, unless it is there already.

    Raises RecipeError if another package has taken the name.
    """
    tables = (AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING)
    owners = [table[QUANT_METHOD].__name__ for table in tables if QUANT_METHOD in table]
    if owners == [ConvexCalderaConfig.__name__, ConvexCalderaQuantizer.__name__]:
        return
    if owners:
        raise RecipeError(f"{QUANT_METHOD!r} is registered with transformers by {owners}")
    register_quantization_config(QUANT_METHOD)(ConvexCalderaConfig)
    register_quantizer(QUANT_METHOD)(ConvexCalderaQuantizer)


register()
