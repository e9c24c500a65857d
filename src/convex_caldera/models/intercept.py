"""Stand between a model and its decoder blocks, so that the model itself says how to call them.

Masks, rotary embeddings and whatever else a family hands to its blocks are made by the model's
own forward; here they are caught on the way, per block, and used again for that block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from convex_caldera.errors import ModelError

# (block index, the block's own forward, args, kwargs) -> what the model sees as its output
Handler = Callable[[int, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


class ForwardStoppedError(Exception):
    """Raised by a handler that has seen enough; never leaves this package."""


@dataclass(frozen=True, eq=False)
class BlockCall:
    """All that a model passes to one block besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, block: Callable[..., Any], hidden: Tensor) -> Tensor:
        """The block's hidden states out, (samples, tokens, width)."""
        return first_output(block(hidden, *self.args, **self.kwargs))


def split_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, BlockCall]:
    """The hidden states of a block's call, and the rest of it."""
    rest = dict(kwargs)
    hidden = args[0] if args else rest.pop("hidden_states", None)
    if not isinstance(hidden, Tensor):
        raise ModelError("decoder blocks must take hidden states first; this model's do not")
    return hidden, BlockCall(args[1:], rest)


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a linear layer is called with."""
    return args[0] if args else kwargs["input"]


def first_output(output: Any) -> Tensor:
    """Hidden states from a block's output, which may be a tuple that starts with them."""
    return output[0] if isinstance(output, tuple) else output


def like_output(hidden: Tensor, output_length: int) -> Any:
    """Hidden states in the form that the model expects; length 0 means a bare tensor."""
    return (hidden, *[None] * (output_length - 1)) if output_length else hidden


@contextmanager
def intercepted(blocks: Sequence[nn.Module], handler: Handler) -> Iterator[None]:
    """Let `handler` answer every call of a block while the context lasts."""

    def answer(index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: handler(index, forward, args, kwargs)

    before = [block.__dict__.get("forward") for block in blocks]
    for index, block in enumerate(blocks):
        block.forward = answer(index, block.forward)
    try:
        yield
    finally:
        for block, own in zip(blocks, before, strict=True):
            del block.forward
            if own is not None:
                block.forward = own


def forward_until_stopped(
    model: nn.Module, blocks: Sequence[nn.Module], tokens: Tensor, handler: Handler
) -> None:
    """The model's forward on tokens (samples, length), which the handler may cut short."""
    run_until_stopped(lambda: model(input_ids=tokens, use_cache=False), blocks, handler)


def run_until_stopped(
    run: Callable[[], Any], blocks: Sequence[nn.Module], handler: Handler
) -> None:
    """A forward that goes through the blocks, which the handler may cut short."""
    with torch.no_grad(), intercepted(blocks, handler), suppress(ForwardStoppedError):
        run()
