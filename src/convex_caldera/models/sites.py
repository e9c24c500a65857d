"""Find the decoder blocks and linear layers of a model by structure, never by name.

The decoder is the largest `nn.ModuleList` whose elements share a class and contain linear
layers. Layers that read the same tensor share an input site; which ones do is seen in one tiny
forward of one block of each kind, by comparing the memory that arrives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from convex_caldera.errors import ModelError
from convex_caldera.models.intercept import (
    ForwardStoppedError,
    first_input,
    first_output,
    intercepted,
    like_output,
    run_until_stopped,
    split_call,
)
from convex_caldera.models.parameters import device_of, stand_ins

_PROBE_TOKENS = 4


@dataclass(frozen=True)
class Site:
    """One linear layer of one decoder block.

    Attributes:
        name: of the module, as `model.layers.0.self_attn.q_proj`.
        shape: (out_features m, in_features n).
        block: index of its block.
        kind: last part of the name, as `q_proj`.
        input_site: name of the first layer that reads the same tensor; shared by all of them.
        has_bias: whether a bias stays beside the weight.
    """

    name: str
    shape: tuple[int, int]
    block: int
    kind: str
    input_site: str
    has_bias: bool


@dataclass(frozen=True, eq=False)
class Structure:
    """The decoder of a model.

    Attributes:
        blocks_name: of the module list, as `model.layers`.
        blocks: its elements, in order.
        sites: their linear layers, block by block.
        output_length: length of the tuple that a block returns, 0 if it returns a tensor.
    """

    blocks_name: str
    blocks: tuple[nn.Module, ...]
    sites: tuple[Site, ...]
    output_length: int

    def block_name(self, index: int) -> str:
        return f"{self.blocks_name}.{index}"

    def renamed(self, blocks_name: str) -> Structure:
        """The same under another name of the module list."""

        def moved(name: str) -> str:
            return blocks_name + name.removeprefix(self.blocks_name)

        sites = tuple(
            replace(site, name=moved(site.name), input_site=moved(site.input_site))
            for site in self.sites
        )
        return replace(self, blocks_name=blocks_name, sites=sites)

    def sites_of(self, index: int) -> tuple[Site, ...]:
        return tuple(site for site in self.sites if site.block == index)


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The decoder blocks and the name of their list.

    Raises:
        ModelError: no list of like modules contains a linear layer.
    """
    found = largest_block_list(model, _text_decoder(model))
    if found is None:
        raise ModelError(
            f"{type(model).__name__} has no decoder blocks: no module list of like modules "
            "with nn.Linear layers inside"
        )
    return found


def largest_block_list(model: nn.Module, prefix: str = "") -> tuple[str, nn.ModuleList] | None:
    """The largest list of like modules with linear layers whose name begins with `prefix`."""
    found = [
        (name, module)
        for name, module in model.named_modules()
        if name.startswith(prefix)
        and isinstance(module, nn.ModuleList)
        and len(module)
        and _is_alike(module)
    ]
    # Of lists nested in each other with equal content, the outermost has the shortest name.
    return max(found, key=lambda entry: (_linear_weights(entry[1]), -len(entry[0])), default=None)


def _text_decoder(model: nn.Module) -> str:
    """Where a model of several kinds of input has its language model; "" is the whole model."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "vision_config"):
        return ""
    decoder = model.get_decoder()  # type: ignore[operator]
    return next(name for name, module in model.named_modules() if module is decoder)


def find_structure(model: nn.Module) -> Structure:
    """Blocks, linear layers and shared inputs of a model, with or without weights.

    Raises:
        ModelError: there are no decoder blocks, or they cannot be called one by one.
    """
    blocks_name, module_list = find_blocks(model)
    tokens = torch.arange(_PROBE_TOKENS, device=device_of(model))[None]
    return structure_of(
        model, blocks_name, module_list, lambda: model(input_ids=tokens, use_cache=False)
    )


def structure_of(
    model: nn.Module, blocks_name: str, module_list: nn.ModuleList, run: Callable[[], Any]
) -> Structure:
    """Linear layers and shared inputs of a list of blocks.

    Args:
        model: holds the blocks, with or without weights.
        blocks_name, module_list: the blocks.
        run: a forward of the model that reaches all blocks.

    Raises:
        ModelError: the blocks cannot be called one by one.
    """
    blocks = tuple(module_list)
    kinds = [_signature(block) for block in blocks]
    probed: dict[int, dict[str, str]] = {kinds.index(kind): {} for kind in dict.fromkeys(kinds)}
    output_length = _probe(model, blocks, probed, run)
    sites = [
        _site(f"{blocks_name}.{index}", index, local, linear, probed[kinds.index(kinds[index])])
        for index, block in enumerate(blocks)
        for local, linear in _linears(block).items()
    ]
    return Structure(blocks_name, blocks, tuple(sites), output_length)


def _site(block: str, index: int, local: str, linear: nn.Linear, readers: dict[str, str]) -> Site:
    return Site(
        name=f"{block}.{local}",
        shape=(linear.out_features, linear.in_features),
        block=index,
        kind=local.rpartition(".")[2],
        # A layer that no probe token reached (an expert not chosen) has its input for itself.
        input_site=f"{block}.{readers.get(local, local)}",
        has_bias=linear.bias is not None,
    )


def _probe(
    model: nn.Module,
    blocks: tuple[nn.Module, ...],
    probed: dict[int, dict[str, str]],
    run: Callable[[], Any],
) -> int:
    """Run the blocks in `probed`, filling layer -> first reader of its input; output length."""
    output_length = 0

    def handler(
        index: int, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        nonlocal output_length
        hidden, call = split_call(args, kwargs)
        if index in probed:
            with _InputWatch(blocks[index]) as watch:
                output = forward(hidden, *call.args, **call.kwargs)
            probed[index].update(watch.first_reader)
            output_length = len(output) if isinstance(output, tuple) else 0
            hidden = first_output(output)
        if index == len(blocks) - 1:
            raise ForwardStoppedError
        return like_output(hidden, output_length)

    with stand_ins(model), _experts_one_by_one(model):
        run_until_stopped(run, blocks, handler)
    return output_length


class _InputWatch:
    """Which linear layers of a block read the same memory; a context around one forward.

    Meanwhile plain linear layers answer with a constant, since only the flow matters.
    """

    def __init__(self, block: nn.Module):
        self.first_reader: dict[str, str] = {}
        self._linears = _linears(block)
        self._seen: dict[tuple[Any, ...], str] = {}
        self._alive: list[Tensor] = []
        self._exits = ExitStack()

    def __enter__(self) -> _InputWatch:
        for name, linear in self._linears.items():
            hook = linear.register_forward_pre_hook(self._watch(name), with_kwargs=True)
            self._exits.callback(hook.remove)
        plain = [linear for linear in self._linears.values() if type(linear) is nn.Linear]
        self._exits.enter_context(intercepted(plain, partial(_constant, plain)))
        return self

    def __exit__(self, *_: object) -> None:
        self._exits.close()

    def _watch(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = first_input(args, kwargs)
            self._alive.append(x)  # else freed memory could be given out again
            first = self._seen.setdefault(_memory(x), name)
            self.first_reader.setdefault(name, first)

        return hook


def _constant(linears: list[nn.Linear], index: int, _: Any, args: Any, kwargs: Any) -> Tensor:
    x = first_input(args, kwargs)
    return x.new_ones(*x.shape[:-1], linears[index].out_features)


@contextmanager
def _experts_one_by_one(model: nn.Module) -> Iterator[None]:
    """Fused experts without grouped products, which refuse the strides of stand-ins."""
    if not hasattr(model, "set_experts_implementation"):
        yield
        return
    before = model.get_experts_implementation()  # type: ignore[operator]
    model.set_experts_implementation("eager")  # type: ignore[operator]
    try:
        yield
    finally:
        model.set_experts_implementation(before)  # type: ignore[operator]


def _memory(x: Tensor) -> tuple[Any, ...]:
    """What two reads have in common if they see the same rows; writes in between tell apart."""
    layout = (x.numel(), x.shape[-1]) if x.is_contiguous() else (*x.shape, *x.stride())
    return (x.data_ptr(), x._version, *layout)


def _linears(module: nn.Module) -> dict[str, nn.Linear]:
    return {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear)}


def _linear_weights(module: nn.Module) -> int:
    return sum(linear.weight.numel() for linear in _linears(module).values())


def _is_alike(module_list: nn.ModuleList) -> bool:
    first = type(module_list[0])
    return all(type(block) is first and _linears(block) for block in module_list)


def _signature(block: nn.Module) -> tuple[Any, ...]:
    return tuple((name, tuple(m.weight.shape)) for name, m in _linears(block).items())
