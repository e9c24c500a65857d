"""What the output head reads: the second moment of the final hidden state."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from torch import Tensor

from convex_caldera.calibrate.statistics import InputAccumulator, InputStatistics
from convex_caldera.models.blocks import HiddenStates, iterate_blocks
from convex_caldera.models.intercept import ForwardStoppedError, first_input
from convex_caldera.models.skeleton import Skeleton


def head_inputs(
    skeleton: Skeleton, tokens: Tensor, name: str, batch_size: int = 8
) -> InputStatistics:
    """E[h h^T] of the inputs h (width n) of the output head, under `name`.

    Args:
        skeleton: a model with a head.
        tokens: (samples, length) token ids.
        batch_size: samples per forward.

    Raises:
        NumericalError, DataError: as `collect`.

    Cost: one forward pass without the head, one block in memory at a time; 2 n^2 flop per token.
    """
    states = HiddenStates(skeleton, tokens, batch_size)
    for index, block in iterate_blocks(skeleton):
        states.advance(index, block)
    head = skeleton.model.get_output_embeddings()  # type: ignore[operator]
    accumulator = InputAccumulator(name, head.in_features, skeleton.device)

    with skeleton.loaded_outside() as model:
        for batch in range(len(states)):

            def seen(
                _: Any, args: tuple[Any, ...], kwargs: dict[str, Any], batch: int = batch
            ) -> None:
                accumulator.add(first_input(args, kwargs), states.samples(batch))
                raise ForwardStoppedError  # logits are not needed

            handle = head.register_forward_pre_hook(seen, with_kwargs=True)
            try:
                with suppress(ForwardStoppedError):
                    states.leave(model, batch)
            finally:
                handle.remove()
    return accumulator.finish()
