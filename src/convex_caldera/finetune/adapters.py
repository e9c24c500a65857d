"""PEFT adapters on compressed models: attach, save as usual, load onto the model they are for.

PEFT knows layers by their class. `attach` tells it, through its own list of custom modules, that
ours are linear; what it then trains and saves is an ordinary LoRA adapter beside the compressed
weights, which stay as they are. Options that look into the weight (DoRA, PiSSA, merging) need a
dense one: `finetune --train dora` is ours.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from convex_caldera.errors import ModelError, RecipeError

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def attach(model: Any, **options: Any) -> Any:
    """A PEFT model with new LoRA layers on `target_modules` of a compressed model.

    Args:
        model: from `convex_caldera.load` or transformers.
        **options: of peft.LoraConfig, such as r=16, lora_alpha=32, target_modules=["q_proj"].

    Raises:
        RecipeError: PEFT is not installed, or an option needs dense weights.
    """
    peft = _peft()
    config = _know_our_layers(peft.LoraConfig(**options))
    with _quietly():
        return peft.get_peft_model(model, config)


def load_adapter(model: Any, directory: Path | str, trainable: bool = False) -> Any:
    """A saved adapter on a compressed model.

    Raises:
        RecipeError: PEFT is not installed.
        ModelError: no adapter there, or one of another model: its layers are not in this one, or
            have other sizes.
    """
    peft = _peft()
    path = Path(directory)
    if not (path / CONFIG).is_file() or not (path / WEIGHTS).is_file():
        raise ModelError(f"{path} holds no adapter: {CONFIG} and {WEIGHTS} are needed")
    _check_sizes(model, path / WEIGHTS)
    config = _know_our_layers(peft.LoraConfig.from_pretrained(str(path)))
    with _quietly():
        return peft.PeftModel.from_pretrained(
            model, str(path), config=config, is_trainable=trainable
        )


@contextmanager
def _quietly() -> Iterator[None]:
    """PEFT warns of every layer class but its own, and then reads in_features and out_features."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Unsupported layer type")
        yield


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise RecipeError("adapters need the package `peft` (extra `finetune`)") from error
    return peft


def _know_our_layers(config: Any) -> Any:
    from peft.tuners.lora import Linear

    from convex_caldera.runtime.linear import CompressedLinear

    if getattr(config, "use_dora", False) or getattr(config, "init_lora_weights", True) is not True:
        raise RecipeError(
            "use_dora and init_lora_weights other than the default read dense weights; "
            "tune with `convex-caldera finetune --train dora`, or dequantize the model first"
        )
    config._register_custom_module({CompressedLinear: Linear})
    return config


def _check_sizes(model: Any, weights: Path) -> None:
    """ModelError unless every factor of the adapter fits the layer that it names."""
    from safetensors import safe_open

    modules = dict(model.named_modules())
    with safe_open(weights, "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
    for name, shape in shapes.items():
        layer, kind, _ = name.removeprefix("base_model.model.").partition(".lora_")
        if not kind:
            continue
        module = modules.get(layer)
        if module is None or not hasattr(module, "in_features"):
            raise ModelError(f"{weights.parent.name} is an adapter of another model: no {layer}")
        first = ".lora_A" in name
        found, wanted = shape[first], module.in_features if first else module.out_features
        if found != wanted:
            raise ModelError(
                f"{weights.parent.name} is an adapter of another model: {layer} has {wanted} "
                f"{'inputs' if first else 'outputs'} here, {found} there"
            )
