"""Codes of blocks of columns in a codebook, nearest or with feedback, by kernels or plain torch.

    value = scale of the block * codeword[code],    code = argmin_k sum_j h_j (x_j - c_kj)^2 + b_k

with h the importance of the columns and b_k what a codeword costs by itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convex_caldera.quantizers.grouped import ScalarCodes
from convex_caldera.quantizers.groups import check_codes, check_columns, check_finite

_CHUNK = 1 << 18  # distances of the plain search at a time


class BlockCodes(ScalarCodes, ABC):
    """Codes (m, blocks), one for every `quantizer.dim` columns begun, of a codebook (K, dim).

    For frozen dataclasses whose fields include these four. Columns missing from a row's last
    block have no weight and are dropped in decoding.
    """

    scales: Tensor
    codebook: Tensor

    @property
    def code_bits(self) -> int:
        width: int = self.quantizer.code_bits
        return width

    @property
    def blocks(self) -> int:
        return -(-self.shape[1] // int(self.quantizer.dim))

    @abstractmethod
    def block_scales(self, first: int, count: int) -> Tensor:
        """Scales of blocks first .. first + count of every row, broadcastable to (m, count)."""

    def block_weights(self, start: int, size: int, device: torch.device) -> Tensor:
        """(1, dim) or (blocks, dim): importance of the columns, zero for those that are missing."""
        dim = self.quantizer.dim
        if size % dim == 0:
            return torch.ones(1, dim, device=device)
        present = torch.ones(size, device=device)
        return torch.nn.functional.pad(present, (0, -size % dim)).view(-1, dim)

    @property
    def offered(self) -> tuple[Tensor, Tensor]:
        """Codewords that are encoded to, (K', dim) float32, and what they cost (K',)."""
        return self.codebook.float(), torch.zeros(len(self.codebook))

    def encode(self, x: Tensor, start: int = 0) -> Tensor:
        """Nearest codes (m, ceil(d / dim)) of columns start .. start + d; uint8 or int32."""
        dim = self.quantizer.dim
        check_columns(x, self.shape, start, dim)
        check_finite(x, "the matrix to encode")
        width = -(-x.shape[1] // dim)
        scale = divisor(self.block_scales(start // dim, width).to(x.device))
        padded = torch.nn.functional.pad(x.float(), (0, width * dim - x.shape[1]))
        points = padded.view(x.shape[0], width, dim) / scale[..., None]
        weights = self.block_weights(start, x.shape[1], x.device)
        codes = nearest(points.reshape(-1, dim), weights, *self.offered)
        return codes.to(self._dtype).view(x.shape[0], width)

    def decode(self, codes: Tensor, start: int = 0) -> Tensor:
        """Values (m, d), float32: codeword * scale."""
        check_codes(codes, len(self.codebook))
        dim = self.quantizer.dim
        scale = self.block_scales(start // dim, codes.shape[1]).to(codes.device)
        values = self.codebook.to(codes.device).float()[codes.long()] * scale[..., None]
        width = min(codes.shape[1] * dim, self.shape[1] - start)
        return values.flatten(1)[:, :width]

    def round_panel(
        self,
        target: Tensor,
        base: Tensor,
        coupling: Tensor,
        start: int,
        outer: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Codes and values of a run of columns with feedback (`core.protocols.RoundsPanels`).

        `outer` (m, p) are scales of the columns around these codes, if there are any.
        """
        from convex_caldera.quantizers import kmeans_kernels as kernels

        dim, width = self.quantizer.dim, target.shape[1]
        check_columns(target, self.shape, start, dim)
        goal, values = target.contiguous().numpy().copy(), np.empty(target.shape, np.float32)
        codes = np.empty((len(goal), -(-width // dim)), np.int32)
        inner = self.block_scales(start // dim, codes.shape[1]).numpy()
        weights = self.block_weights(start, width, target.device).numpy()
        table, bias = (part.contiguous().numpy() for part in self.offered)
        around = np.ones((1, width), np.float32) if outer is None else outer.contiguous().numpy()
        against, onto = base.contiguous().numpy(), coupling.contiguous().numpy()
        x = np.zeros((len(goal), dim), np.float32)
        for block in range(codes.shape[1]):
            scale = inner[:, block % inner.shape[1]]
            kernels.normalize(goal, around, scale, block, x)
            one = weights[block % len(weights)][None]
            codes[:, block] = kernels.nearest(x, one, table, bias)[0]
            kernels.settle(goal, against, onto, around, scale, table, codes, block, values)
        check_finite(torch.from_numpy(goal), "what the feedback made of the matrix")
        return torch.from_numpy(codes).to(self._dtype), torch.from_numpy(values)

    def tensors(self) -> dict[str, Tensor]:
        return {"scales": self.scales, "codebook": self.codebook}

    @property
    def _dtype(self) -> torch.dtype:
        return torch.uint8 if self.code_bits <= 8 else torch.int32


def divisor(scale: Tensor) -> Tensor:
    """Scales to divide by; what has scale 0 becomes 0."""
    return torch.where(scale == 0, torch.inf, scale)


def nearest(x: Tensor, weights: Tensor, codebook: Tensor, bias: Tensor) -> Tensor:
    """Codes (N,), int32, of x (N, dim): compiled on the CPU, plain torch elsewhere.

    `weights` (P, dim): row i mod P serves point i; `bias` (K,) is added to a codeword's distance.
    """
    if x.device.type != "cpu":
        return nearest_plain(x, weights, codebook.to(x.device), bias.to(x.device))
    from convex_caldera.quantizers import kmeans_kernels as kernels

    arrays: Any = (part.detach().contiguous().numpy() for part in (x, weights, codebook, bias))
    return torch.from_numpy(kernels.nearest(*arrays)[0])


def nearest_plain(x: Tensor, weights: Tensor, codebook: Tensor, bias: Tensor) -> Tensor:
    """The same by differences of all pairs, in chunks."""
    table = codebook.float()
    w = weights.repeat(-(-x.shape[0] // weights.shape[0]), 1)[: x.shape[0]]
    step = max(1, _CHUNK // table.shape[0])
    codes = []
    for points, part in zip(x.split(step), w.split(step), strict=True):
        gaps = (points[:, None, :] - table).square_() * part[:, None, :]
        codes.append((gaps.sum(-1) + bias).argmin(1))
    return torch.cat(codes).int()
