"""The parts of a vision-language model that see images: the vision tower and the projector.

The tower is the submodule with the vision configuration; its blocks are the largest list of like
modules inside. The projector is every linear layer that lies neither in the tower, nor in the
language model, nor is the output head. Blocks are counted on from those of the language model, the
projector being the last: statistics and reports of all parts then go by one number.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import nn

from convex_caldera.errors import ModelError, RecipeError
from convex_caldera.models.parameters import device_of
from convex_caldera.models.sites import Site, largest_block_list, structure_of

Module = Literal["language", "tower", "projector"]
MODULES: tuple[Module, ...] = get_args(Module)


@dataclass(frozen=True)
class ImageParts:
    """Linear layers of tower and projector, each part in order."""

    tower: tuple[Site, ...]
    projector: tuple[Site, ...]

    def __iter__(self) -> Any:
        yield from self.tower
        yield from self.projector


def parse_modules(text: str) -> frozenset[Module]:
    """The parts of "language,tower".

    Raises:
        RecipeError: an unknown part, or none.
    """
    wanted = {part.strip() for part in text.split(",") if part.strip()}
    unknown = sorted(wanted - set(MODULES))
    if unknown or not wanted:
        raise RecipeError(
            f"modules {text!r}: {unknown[0] if unknown else 'none'} is no part of a model; "
            f"choose among {', '.join(MODULES)}"
        )
    return frozenset(wanted)  # type: ignore[arg-type]


def find_image_parts(model: Any, decoder: nn.Module, blocks: int) -> ImageParts:
    """Tower and projector of a model with or without weights.

    Args:
        model: a transformers model that reads images.
        decoder: its language model without head.
        blocks: how many the language model has; the tower's are counted on from there.

    Raises:
        ModelError: its tower is not found, or does not run on a square image alone.
    """
    name, tower = _find_tower(model)
    tower_sites = tuple(
        replace(site, block=site.block + blocks) for site in _tower_sites(model, name, tower)
    )
    last = blocks + len({site.block for site in tower_sites})
    return ImageParts(tower_sites, _projector_sites(model, tower, decoder, last))


def _find_tower(model: Any) -> tuple[str, nn.Module]:
    kind = type(model.config.vision_config)
    for name, module in model.named_modules():
        if name and type(getattr(module, "config", None)) is kind:
            return name, module
    raise ModelError(f"{type(model).__name__} has no module with its vision configuration")


def _tower_sites(model: nn.Module, name: str, tower: Any) -> tuple[Site, ...]:
    found = largest_block_list(model, f"{name}.")
    if found is None:
        raise ModelError(f"{name}: the vision tower has no blocks with nn.Linear layers inside")
    config = tower.config
    try:
        shape = (1, config.num_channels, config.image_size, config.image_size)
        pixels = torch.zeros(shape, device=device_of(model))
        structure = structure_of(model, *found, lambda: tower(pixel_values=pixels))
    except (AttributeError, TypeError, ValueError) as error:
        raise ModelError(
            f"{name}: {type(tower).__name__} does not run on a square image alone ({error}); "
            "compress the language model only"
        ) from error
    return structure.sites


def _projector_sites(
    model: Any, tower: nn.Module, decoder: nn.Module, block: int
) -> tuple[Site, ...]:
    elsewhere = {*tower.modules(), *decoder.modules(), model.get_output_embeddings()}
    return tuple(
        Site(
            name=name,
            shape=(module.out_features, module.in_features),
            block=block,
            kind=name.rpartition(".")[2],
            input_site=name,
            has_bias=module.bias is not None,
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module not in elsewhere
    )


def of_modules(
    language: Collection[Site], images: ImageParts | None, modules: Collection[Module]
) -> tuple[Site, ...]:
    """The layers of the chosen parts, language model first."""
    parts = {
        "language": tuple(language),
        "tower": images.tower if images else (),
        "projector": images.projector if images else (),
    }
    return tuple(site for module in MODULES if module in modules for site in parts[module])
