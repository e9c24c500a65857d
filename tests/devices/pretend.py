"""A device that is not there: tensors that say "cuda" and compute on the CPU.

Inside `pretended()` every operator checks that its tensors live on one device, as CUDA would:
operands from the CPU are refused unless they have no dimensions, are the indices of an indexed
tensor, or are copied; `.numpy()` of a pretended tensor fails as it does for one on a GPU. What
is on no device (a shape, a number) is read from the values, which are real. So code that mixes
devices fails here, without a GPU, at the line where it would fail there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("meta")

# Operators whose listed tensors may be on the CPU while the first is on the device.
COPIES = {"aten::copy_", "aten::_to_copy", "aten::_copy_from"}
INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}


class Pretended(Tensor):
    """A tensor whose device is DEVICE and whose values are `held`, on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, real: Tensor) -> Pretended:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            real.shape,
            strides=real.stride(),
            storage_offset=real.storage_offset(),
            dtype=real.dtype,
            device=DEVICE,
            requires_grad=False,
        )

    def __init__(self, real: Tensor) -> None:
        self.held = real

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Pretended({self.held!r})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return _dispatch(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    """Catches what has no pretended argument: factories that name the device."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and to say so would import the compiler

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return _dispatch(func, args, kwargs or {})


@contextmanager
def pretended() -> Iterator[torch.device]:
    """Within, `tensor.to(device)` of the device given moves there."""
    make = torch.tensor

    def tensor(data: Any, *, device: Any = None, **options: Any) -> Tensor:
        """What `torch.tensor` does, but through `.to`, which the mode sees."""
        made = make(data, **options)
        return made if device is None else made.to(device)

    with mock.patch("torch.tensor", tensor), _Mode():
        yield DEVICE


def _dispatch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    leaves = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    there = [x for x in leaves if isinstance(x, Pretended)]
    name = func._schema.name
    if there and name not in COPIES:
        _require_one_device(name, args, leaves)
    target = kwargs.get("device")
    if target is None:
        on_device = bool(there)
    else:
        on_device = torch.device(target).type == DEVICE.type
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if name == "aten::copy_":
        on_device = isinstance(args[0], Pretended)
    generator = kwargs.get("generator")
    if on_device and generator is not None and generator.device.type != DEVICE.type:
        raise RuntimeError(f"{name}: a generator of the CPU draws for {DEVICE}")
    inner_args, inner_kwargs = tree_map(_real, (args, kwargs))
    result = func(*inner_args, **inner_kwargs)
    written = _written(func, args, kwargs)
    if written is not None:
        return written
    return (
        tree_map(lambda x: Pretended(x) if isinstance(x, Tensor) else x, result)
        if (on_device)
        else result
    )


def _require_one_device(name: str, args: tuple[Any, ...], leaves: list[Tensor]) -> None:
    allowed = set()
    if name in INDEXED and isinstance(args[0], Pretended):
        allowed = {id(x) for x in args[1] if x is not None}
    strangers = [
        x for x in leaves if not isinstance(x, Pretended) and x.dim() > 0 and id(x) not in allowed
    ]
    if strangers:
        shapes = [tuple(x.shape) for x in strangers]
        raise RuntimeError(f"{name} mixes {DEVICE} and the CPU: CPU tensors of shapes {shapes}")


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The argument that an in-place operator or one with `out` returns; None for all others."""
    found = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            found.append(value)
    if not found or not func._schema.returns:
        return None
    return found[0] if len(func._schema.returns) == 1 else tuple(found)


def _real(x: Any) -> Any:
    return x.held if isinstance(x, Pretended) else x
