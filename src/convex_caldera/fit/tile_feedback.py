"""Feedback between the tiles of a matrix that is rounded under a two-sided curvature.

With O = P C P^T and H = U D U^T (unit upper in blocks of `rows` and `cols`), the loss of an error
E = W - W^ is sum_IJ tr(C_I e_IJ D_J e_IJ^T), e = P^T E U. So tile (I, J) is rounded towards

    W_IJ + (E U)_IJ from the tiles to its left + (P^T (E U))_IJ from the tiles above.

Tiles on one anti-diagonal, a wave, do not see each other: two batched products serve all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

Place = tuple[slice, slice]


class TileFeedback:
    """What tiles are to be rounded to, given the errors of those before them.

    Everything is padded by zeros to whole tiles. A wave takes its rows of tiles downwards and its
    columns backwards; blocks of columns are kept last to first, so that both are slices.

    Args:
        W: the target (m, n).
        unit_upper: U (n, n), identity cols x cols diagonal blocks.
        output_upper: P (m, m), identity rows x rows diagonal blocks.
        rows, cols: of a tile.

    Memory: six matrices of the size of W, U and P together, at most.
    """

    def __init__(self, W: Tensor, unit_upper: Tensor, output_upper: Tensor, rows: int, cols: int):
        self.shape = m, n = (W.shape[0], W.shape[1])
        self.rows, self.cols = rows, cols
        self.high, self.wide = high, wide = -(-m // rows), -(-n // cols)
        self._target = padded(W, high * rows, wide * cols).view(high, rows, wide, cols)
        U = padded(unit_upper.to(W.dtype), wide * cols, wide * cols)
        self._inputs = U.view(-1, wide, cols).transpose(0, 1).flip(0)  # (wide, n, cols)
        P = padded(output_upper.to(W.dtype), high * rows, high * rows)
        self._outputs = P.view(-1, high, rows).permute(1, 2, 0)  # (high, rows, m)
        self._error = W.new_zeros(high, rows, wide * cols)  # E of the tiles done
        self._carried = W.new_zeros(wide, high * rows, cols)  # E U of the tiles done

    @property
    def waves(self) -> int:
        """Anti-diagonals, from the upper left tile to the lower right."""
        return self.high + self.wide - 1

    def tiles(self, wave: int) -> tuple[Tensor, Tensor]:
        """Rows and columns of tiles of a wave, downwards."""
        i = torch.arange(max(0, wave - self.wide + 1), min(wave + 1, self.high))
        return i, wave - i

    def places(self, wave: int) -> list[Place]:
        """Where the tiles of a wave lie in W."""
        (m, n), h, w = self.shape, self.rows, self.cols
        return [
            (slice(i * h, min((i + 1) * h, m)), slice(j * w, min((j + 1) * w, n)))
            for i, j in zip(*map(Tensor.tolist, self.tiles(wave)), strict=True)
        ]

    def goals(self, wave: int) -> tuple[Tensor, Tensor]:
        """What the tiles of a wave are rounded to, and (E U) left of them; (tiles, rows, cols)."""
        i, j = self.tiles(wave)
        down, back = slice(int(i[0]), int(i[-1]) + 1), self._turned(j)
        # Beyond these columns and rows nothing is done yet: errors are zero.
        done, above = slice(0, int(j[0]) * self.cols), slice(0, int(i[-1]) * self.rows)
        left = self._error[down, :, done] @ self._inputs[back, done]
        over = self._outputs[down, :, above] @ self._carried[back, above]
        return self._target[i, :, j] + left + over, left

    def settle(self, wave: int, left: Tensor, values: Tensor) -> None:
        """Take what a wave was rounded to, (tiles, rows, cols) with zeros beyond W."""
        i, j = self.tiles(wave)
        high, wide, h, w = self.high, self.wide, self.rows, self.cols
        errors = self._target[i, :, j] - values
        self._error.view(high, h, wide, w)[i, :, j] = errors
        self._carried.view(wide, high, h, w)[wide - 1 - j, i] = left + errors

    def error(self) -> Tensor:
        """E (m, n) of all tiles."""
        m, n = self.shape
        return self._error.view(self.high * self.rows, self.wide * self.cols)[:m, :n]

    def _turned(self, j: Tensor) -> slice:
        """Falling column blocks j as they are kept."""
        return slice(self.wide - 1 - int(j[0]), self.wide - int(j[-1]))


def padded(x: Tensor, *shape: int) -> Tensor:
    """x with zeros after it in every dimension, up to a shape."""
    if tuple(x.shape) == shape:
        return x.contiguous()
    out = x.new_zeros(shape)
    out[tuple(slice(size) for size in x.shape)] = x
    return out
