"""Windows of text for training, and those that only validation sees."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from convex_caldera.errors import DataError

VALIDATION_SHARE = 1 / 8


@dataclass(frozen=True, eq=False)
class TrainingText:
    """Token windows (samples, length), training ones first, in batches of `batch_size`.

    `training` and `validation` are the numbers of the batches of each split.
    """

    tokens: Tensor
    batch_size: int
    training: range
    validation: range

    def batch(self, number: int) -> Tensor:
        """The tokens of one batch."""
        start = number * self.batch_size
        return self.tokens[start : start + self.batch_size]

    @property
    def validation_tokens(self) -> Tensor:
        """The windows of the validation split."""
        return self.tokens[self.validation.start * self.batch_size :]


def split_windows(tokens: Tensor, batch_size: int, share: float = VALIDATION_SHARE) -> TrainingText:
    """Set the last windows apart for validation: a share of them, at least one.

    Training windows that do not fill a batch are left out; with fewer than one batch of them the
    batch becomes smaller.

    Raises:
        DataError: fewer than two windows, one to train on and one to validate with.
    """
    count = len(tokens)
    if count < 2:
        raise DataError(
            f"{count} window of {tokens.shape[1]} tokens cannot be split into training and "
            "validation; give more text or a smaller --seqlen"
        )
    held_out = max(1, round(share * count))
    batch_size = min(batch_size, count - held_out)
    batches = (count - held_out) // batch_size
    kept = torch.cat([tokens[: batches * batch_size], tokens[count - held_out :]])
    more = -(-held_out // batch_size)
    return TrainingText(kept, batch_size, range(batches), range(batches, batches + more))
