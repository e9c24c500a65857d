"""One process or many: how gradients and figures of several devices become one.

Parameters are few and replicated, so data parallelism is an average of their gradients after the
backward pass. Launched by `accelerate launch` or `torchrun`, every process works on batches of its
own; the first one writes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from convex_caldera.errors import RecipeError


class Team:
    """Process `index` of `size`; alone unless started by a launcher.

    Raises:
        RecipeError: several processes were launched, and `accelerate` is not installed.
    """

    def __init__(self) -> None:
        self.index, self.size = 0, 1
        self.device: torch.device | None = None
        self._accelerator = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            try:
                from accelerate import Accelerator
            except ImportError as error:
                raise RecipeError(
                    "several processes need the package `accelerate` (extra `finetune`)"
                ) from error
            self._accelerator = Accelerator()
            self.index = self._accelerator.process_index
            self.size = self._accelerator.num_processes
            self.device = self._accelerator.device

    @property
    def leads(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.index == 0

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by its mean over all processes, in place, in one message."""
        if self._accelerator is None or not tensors:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        mean = self._accelerator.reduce(flat, "mean")
        for tensor, part in zip(tensors, mean.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def wait(self) -> None:
        """Until all processes are here."""
        if self._accelerator is not None:
            self._accelerator.wait_for_everyone()
