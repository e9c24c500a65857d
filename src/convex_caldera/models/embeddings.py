"""The matrices between tokens and vectors: the input embedding and the output head.

    x_t = E[token_t],      logits = h E'^T

Both are (vocabulary, width), rows are tokens. Where a model ties them, E' = E is one matrix with
two uses: one variable, stored and counted once. Position embeddings are neither and stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from convex_caldera.errors import ModelError
from convex_caldera.models.checkpoint import Checkpoint
from convex_caldera.models.names import renamed, stored_name
from convex_caldera.models.sites import Site

Use = Literal["lookup", "head"]
# Of sites that are in no decoder block.
OUTSIDE = -1


@dataclass(frozen=True)
class EmbeddingSite(Site):
    """An embedding as a layer (m = vocabulary, n = width) outside of all blocks.

    Attributes:
        parameter: its name in the model, without ".weight"; `name` is that in the checkpoint.
        uses: what the model does with it, both where it is tied.
        copies: further tensors of the checkpoint that hold the same matrix.
    """

    parameter: str = ""
    uses: tuple[Use, ...] = ()
    copies: tuple[str, ...] = ()


def find_embeddings(
    model: nn.Module, names: Mapping[str, str], checkpoint: Checkpoint
) -> tuple[EmbeddingSite, ...]:
    """Input embedding and output head of a model: one site if they are tied, else two.

    Args:
        model: a transformers language model, with or without weights.
        names: parameter -> name in the checkpoint; tied ones have the same (`models.names`).

    Raises:
        ModelError: one of them is no matrix with a name of its own in the checkpoint.
    """
    found: dict[str, EmbeddingSite] = {}
    for use, own in embedding_modules(model).items():
        stored = names.get(f"{own}.weight") or _old_name(model, f"{own}.weight", checkpoint)
        if not stored.endswith(".weight"):
            raise ModelError(f"{own} is no tensor of the checkpoint; leave out --embeddings")
        site = found.get(stored)
        if site is None:
            found[stored] = _site(model, own, stored, use)
            continue
        again = stored_name(f"{own}.weight", model, checkpoint)
        copies = () if again in (None, stored) else (again,)
        found[stored] = replace(site, uses=(*site.uses, use), copies=copies)
    return tuple(found.values())


def without_embeddings(sites: Iterable[Site]) -> tuple[Site, ...]:
    """The linear layers among the sites."""
    return tuple(site for site in sites if not isinstance(site, EmbeddingSite))


def copies_of(sites: Iterable[Site]) -> dict[str, str]:
    """Tensors of the checkpoint that repeat one of these layers -> the layer."""
    return {
        copy: site.name for site in sites if isinstance(site, EmbeddingSite) for copy in site.copies
    }


def embedding_modules(model: Any) -> dict[Use, str]:
    """The module of each use by its name in the model; a use that a model has not is left out."""
    modules: dict[Use, Any] = {
        "lookup": model.get_input_embeddings(),
        "head": model.get_output_embeddings(),
    }
    kinds: dict[Use, type[nn.Module]] = {"lookup": nn.Embedding, "head": nn.Linear}
    names = {id(module): name for name, module in model.named_modules()}
    return {
        use: names[id(module)]
        for use, module in modules.items()
        if isinstance(module, kinds[use]) and id(module) in names
    }


def _old_name(model: nn.Module, own: str, checkpoint: Checkpoint) -> str:
    """The tensor that transformers gives this name on loading; "" if there is none."""
    return next((name for name in checkpoint.names if renamed(model, name) == own), "")


def _site(model: nn.Module, own: str, stored: str, use: Use) -> EmbeddingSite:
    module = model.get_submodule(own)
    m, n = module.weight.shape  # type: ignore[misc]
    name = stored.removesuffix(".weight")
    return EmbeddingSite(
        name=name,
        shape=(int(m), int(n)),
        block=OUTSIDE,
        kind=name.rpartition(".")[2],
        input_site=name,
        has_bias=getattr(module, "bias", None) is not None,
        parameter=own,
        uses=(use,),
    )
