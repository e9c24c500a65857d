"""The bit stream of a trellis-coded matrix: which bits make which weight's state (normative).

Tiles. Columns are cut into blocks of 16, rows into tile rows of 16; the last of each may be
smaller. A tile of h rows and d columns holds T = h d weights in row-major order, t = d r + c.

Rates. A rate is r / 16 bits a weight, r an integer, 16 <= r <= 128. After weight t of a tile,

    end(t) = floor((t + 1) r / 16)

bits of the tile have been used, so weight t brings K_t = end(t) - end(t - 1) new ones and every
row of a full tile is r bits. The tile's stream has N = end(T - 1) bits. A fractional rate so
alternates between two integer ones from weight to weight: one trellis with r T / 16 bits of
freedom and not two trellises side by side, which would cost 25 % more error half-way.

States. The state of weight t is the L-bit window of the stream that ends before bit end(t), its
first bit the most significant:

    tail-biting (chain = 0):  the tile's own bits, read cyclically: bit i is bit i mod N
    chained (chain = c > 0):  the streams of c consecutive tiles of one column block, top down,
                              form one stream, and bits before its start are 0

so that any weight decodes alone, from ceil((L + 7) / 8) + 1 neighbouring bytes.

Bytes. A tile's stream is stored most significant bit first in ceil(N / 8) bytes, the spare
bits 0. Tile rows follow each other, within one the tiles from left to right.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

TILE = 16
RATE_UNIT = 16  # rates are multiples of 1 / RATE_UNIT bits


def step_ends(sixteenths: int, size: int) -> NDArray[np.int64]:
    """end(t) for t = 0 .. size - 1."""
    return (np.arange(1, size + 1, dtype=np.int64) * sixteenths) // RATE_UNIT


def step_bits(sixteenths: int, size: int) -> NDArray[np.int64]:
    """K_t for t = 0 .. size - 1, the new bits of each weight of a tile."""
    return np.diff(step_ends(sixteenths, size), prepend=0)


@dataclass(frozen=True)
class Tiling:
    """Sizes of the tiles of an (m, n) matrix at one rate."""

    shape: tuple[int, int]
    sixteenths: int

    @property
    def heights(self) -> list[int]:
        """Rows of each tile row."""
        return _cuts(self.shape[0])

    @property
    def widths(self) -> list[int]:
        """Columns of each column block."""
        return _cuts(self.shape[1])

    @property
    def tile_bytes(self) -> int:
        """Bytes of a full tile; in memory every tile takes as many."""
        return TILE * self.sixteenths // 8

    def num_bits(self, height: int, width: int) -> int:
        """N, the stream's length in a tile of this size."""
        return height * width * self.sixteenths // RATE_UNIT

    def num_bytes(self, height: int, width: int) -> int:
        """Stored bytes of a tile of this size."""
        return -(-self.num_bits(height, width) // 8)

    @property
    def packed_bytes(self) -> int:
        """Stored bytes of the whole matrix."""
        return sum(self.num_bytes(h, d) for h in self.heights for d in self.widths)

    def byte_mask(self) -> NDArray[np.bool_]:
        """Which bytes of the in-memory codes (tile rows, blocks x tile_bytes) are stored."""
        used = np.array([[self.num_bytes(h, d) for d in self.widths] for h in self.heights])
        mask: NDArray[np.bool_] = np.arange(self.tile_bytes) < used[:, :, None]
        return mask.reshape(len(self.heights), -1)

    def spare_bits(self) -> NDArray[np.uint8]:
        """Bits of each in-memory code byte that are always 0."""
        used = np.array([[self.num_bits(h, d) for d in self.widths] for h in self.heights])
        left = np.clip(used[:, :, None] - 8 * np.arange(self.tile_bytes), 0, 8)
        return (0xFF >> left).astype(np.uint8).reshape(len(self.heights), -1)


def _cuts(length: int) -> list[int]:
    return [TILE] * (length // TILE) + [length % TILE] * (length % TILE > 0)
