"""Put compressed modules in the place of linear ones in a model skeleton."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from convex_caldera.errors import FormatError
from convex_caldera.quantizers.neural import neural_part
from convex_caldera.recipes.records import from_record
from convex_caldera.runtime.linear import CompressedLinear
from convex_caldera.runtime.names import own_name
from convex_caldera.storage.spec import Spec


def replace_linears(model: nn.Module, specs: Mapping[str, Spec]) -> dict[str, CompressedLinear]:
    """Replace the named linear layers, in place, by empty modules of the same device and dtype.

    Args:
        model: usually a skeleton on the meta device.
        specs: layer name, as in the file, to spec; see `own_name` for how names may differ.

    Returns:
        Module name -> new module.

    Raises:
        FormatError: the model has no such layer, it is not linear, is of another shape, or is
            tied to another weight.
    """
    modules = dict(model.named_modules())
    parameters = set(dict(model.named_parameters(remove_duplicate=False)))
    tied = _tied_names(model)
    replaced: dict[str, CompressedLinear] = {}
    homes: list[tuple[CompressedLinear, str]] = []
    for stored, spec in specs.items():
        name = _module_name(model, parameters, stored)
        old = modules[name]
        shape = _linear_shape(old)
        if shape != tuple(spec["shape"]):
            raise FormatError(
                f"{stored}: stored as {tuple(spec['shape'])}, but the model has "
                f"{type(old).__name__} {shape}; config.json does not belong to these weights"
            )
        if f"{name}.weight" in tied:
            raise FormatError(f"{stored}: is tied to another weight and cannot be compressed alone")
        new = CompressedLinear(
            spec,
            bias=getattr(old, "bias", None) is not None,
            dtype=old.weight.dtype,
            device=old.weight.device,
        )
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent) if parent else model, child, new)
        replaced[name] = new
        homes += [(new, home) for home in homes_of(spec)]
    for module, home in homes:
        name = _module_name(model, parameters, home)
        if name not in replaced:
            raise FormatError(f"{home}: a decoder is borrowed from it, but it is not compressed")
        module.lenders[home] = replaced[name]
    return replaced


def homes_of(spec: Spec) -> list[str]:
    """Layers that store a decoder for one with this spec."""
    items = [item for item in spec["terms"] if item["kind"] == "coded"]
    cores = [neural_part(from_record(item["quantizer"]))[1] for item in items]
    return [core.home for core in cores if core is not None and core.home]


def _module_name(model: nn.Module, parameters: set[str], stored: str) -> str:
    name = own_name(model, f"{stored}.weight", parameters)
    if name is None:
        raise FormatError(
            f"{stored}: the model has no such layer; is config.json that of this model?"
        )
    return name.removesuffix(".weight")


def _linear_shape(module: nn.Module) -> tuple[int, ...]:
    if isinstance(module, nn.Linear):
        return (module.out_features, module.in_features)
    return ()


def _tied_names(model: nn.Module) -> set[str]:
    pairs = getattr(model, "all_tied_weights_keys", None) or {}
    return set(pairs) | set(pairs.values())
