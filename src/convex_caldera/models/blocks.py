"""Run a model over many samples with one decoder block in memory at a time.

    h_0 = embed(tokens),   h_{i+1} = block_i(h_i),   logits = head(h_last)

Hidden states of all samples wait in memory between blocks. Every block gets exactly what the
model itself passes to it (masks, rotary embeddings, position ids), caught once per batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from convex_caldera.errors import DataError, RecipeError
from convex_caldera.models.intercept import (
    BlockCall,
    ForwardStoppedError,
    forward_until_stopped,
    intercepted,
    like_output,
    split_call,
)
from convex_caldera.models.skeleton import Skeleton


class HiddenStates:
    """Hidden states of all samples before one block, moved forward block by block.

    Args:
        skeleton: the model.
        tokens: (samples, length) token ids.
        batch_size: samples per forward.
        store: type in which hidden states wait; bfloat16 halves the memory and rounds.

    Raises:
        DataError: tokens are not a non-empty integer matrix, or beyond the vocabulary.

    Memory: samples * length * width values, and one block.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        tokens: Tensor,
        batch_size: int = 8,
        store: torch.dtype = torch.float32,
    ):
        if batch_size < 1:
            raise RecipeError(f"batch_size must be at least 1, got {batch_size}")
        _check_tokens(tokens, skeleton)
        self.skeleton = skeleton
        self.store = store
        self._batch_size = batch_size
        self.batches: tuple[Tensor, ...] = torch.split(tokens, batch_size)
        self._hidden: Tensor | None = None
        self._calls: list[list[BlockCall]] = []
        with skeleton.loaded_outside(head=False):
            for batch, ids in enumerate(self.batches):
                hidden, calls = self._enter(ids)
                self.put(batch, hidden)
                self._calls.append(self._shared(calls))

    def __len__(self) -> int:
        return len(self.batches)

    def samples(self, batch: int) -> range:
        """Which samples a batch holds."""
        start = sum(len(tokens) for tokens in self.batches[:batch])
        return range(start, start + len(self.batches[batch]))

    def hidden(self, batch: int) -> Tensor:
        """Hidden states of one batch (samples, length, width), ready for computation."""
        assert self._hidden is not None  # filled when made
        kept = self._hidden.split(self._batch_size)[batch]
        return kept.to(self.skeleton.device, self.skeleton.dtype)

    def output(self, index: int, block: nn.Module, batch: int) -> Tensor:
        """Block `index` on one batch; the stored hidden states stay as they are."""
        with torch.no_grad():
            return self.call(index, block, batch)

    def call(self, index: int, block: nn.Module, batch: int) -> Tensor:
        """The same with gradients, for training the block."""
        return self._calls[batch][index](block, self.hidden(batch))

    def put(self, batch: int, hidden: Tensor) -> None:
        """Store the hidden states of one batch in place of those before.

        All lie in one tensor: memory so large goes back to the system when it is freed.
        """
        if self._hidden is None:
            samples = sum(map(len, self.batches))
            self._hidden = torch.empty(samples, *hidden.shape[1:], dtype=self.store)
        self._hidden.split(self._batch_size)[batch].copy_(hidden)

    def advance(self, index: int, block: nn.Module) -> None:
        """Replace all hidden states by the outputs of block `index`."""
        for batch in range(len(self)):
            self.put(batch, self.output(index, block, batch))

    def logits(self) -> Iterator[Tensor]:
        """Logits (samples, length, vocabulary) of every batch, after all blocks."""
        with self.skeleton.loaded_outside() as model:
            for batch in range(len(self)):
                yield self.leave(model, batch)

    def leave(self, model: nn.Module, batch: int) -> Tensor:
        """Logits of one batch, after all blocks; `model` has what lies outside of them loaded."""
        structure = self.skeleton.structure
        last = len(structure.blocks) - 1
        tokens, hidden = self.batches[batch], self.hidden(batch)

        def handler(index: int, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            passing = hidden if index == last else split_call(args, kwargs)[0]
            return like_output(passing, structure.output_length)

        with torch.no_grad(), intercepted(structure.blocks, handler):
            return model(input_ids=tokens.to(self.skeleton.device), use_cache=False).logits

    def _enter(self, tokens: Tensor) -> tuple[Tensor, list[BlockCall]]:
        """What reaches block 0, and what every block is given besides."""
        structure = self.skeleton.structure
        entered: list[Tensor] = []
        calls: list[BlockCall] = []

        def handler(index: int, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden, call = split_call(args, kwargs)
            entered.append(hidden)
            calls.append(call)
            if index == len(structure.blocks) - 1:
                raise ForwardStoppedError
            return like_output(hidden, structure.output_length)

        device = self.skeleton.device
        forward_until_stopped(self.skeleton.model, structure.blocks, tokens.to(device), handler)
        return entered[0], calls

    def _shared(self, calls: list[BlockCall]) -> list[BlockCall]:
        """The calls of the first batch if they are equal, as they are unless masks differ."""
        if self._calls and _equal(_contents(self._calls[0]), _contents(calls)):
            return self._calls[0]
        return calls


def iterate_blocks(skeleton: Skeleton) -> Iterator[tuple[int, nn.Module]]:
    """Every decoder block in turn with its real weights; freed when the next one is asked for."""
    structure = skeleton.structure
    for index in range(len(structure.blocks)):
        with skeleton.loaded(structure.block_name(index)) as block:
            yield index, block


def _check_tokens(tokens: Tensor, skeleton: Skeleton) -> None:
    if tokens.dim() != 2 or not tokens.numel() or tokens.is_floating_point():
        raise DataError(
            f"tokens must be an integer matrix (samples, length), got {tuple(tokens.shape)} "
            f"of {tokens.dtype}"
        )
    vocabulary = skeleton.model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    least, greatest = int(tokens.min()), int(tokens.max())
    if least < 0 or greatest >= vocabulary:
        raise DataError(
            f"token ids run from {least} to {greatest} but the model's vocabulary has "
            f"{vocabulary}; the tokenizer belongs to another model"
        )


def _contents(calls: list[BlockCall]) -> list[Any]:
    return [(call.args, call.kwargs) for call in calls]


def _equal(a: Any, b: Any) -> bool:
    """Deep equality of what blocks are called with."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    return isinstance(a, (bool, int, float, str)) and a == b
