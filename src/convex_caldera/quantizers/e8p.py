"""E8P lattice quantization at 2, 3 and 4 bits (Tseng et al., QuIP#, arXiv 2402.04396).

Eight weights share one code. Two bits are one E8P12 point; three and four bits add a second
stage to what the first leaves over, as one quantizer with one scale:

    W^ = s (q1 + q2 / rho),    q1 = E8P(W / s),    q2 = B(rho (W / s - q1)),

where B is E81B (3 bits) or E8P again (4 bits) and s = rms(W) / c is one float32 per matrix.
QuIP# tunes c for the first stage alone and then rho, and takes the nearest q1. Tuned together
on the Gaussian source and searched as a pair (`e8p_pairs`), two stages leave .0285 and .0077 of
its variance at 3 and 4 bits; QuIP# leaves .0296 and .0097.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from convex_caldera.errors import FormatError, NumericalError, RecipeError
from convex_caldera.quantizers import e8p_pairs, e8p_points
from convex_caldera.quantizers.groups import (
    check_codes,
    check_columns,
    check_finite,
    check_matrix,
    checked_tensor,
    sliced_shape,
)

# bits -> (c, rho): input rms in units of the first stage's grid, and the second stage's gain.
# QuIP# code, lib/codebook; the joint ones minimize the distortion of N(0, 1), on a grid of
# steps .02 in c and .05 in rho.
_CODEBOOK_SCALES = {2: (1.03, 1.0), 3: (0.98, 2.04), 4: (1.03, 3.45)}
_JOINT_SCALES = {2: (1.03, 1.0), 3: (0.99, 1.77), 4: (0.90, 3.7)}
_SECOND = {2: None, 3: e8p_pairs.BALL_STAGE, 4: e8p_pairs.E8P_STAGE}


@dataclass(frozen=True)
class E8P:
    """E8P12 points in one or two stages; `bits` is 2, 3 or 4 per weight.

    Args:
        bits: per weight; a code of 8 weights has 8 * bits bits.
        joint_scale: scales tuned for both stages together; False gives those of QuIP#'s code.
        neighbors: how hard two stages search, 0 .. 7 (see `e8p_pairs`); decoding is the same.

    Raises:
        RecipeError: other bits or neighbors.
    """

    bits: int
    joint_scale: bool = True
    neighbors: int = 1

    kind: ClassVar[str] = "e8p"

    def __post_init__(self) -> None:
        if self.bits not in _JOINT_SCALES:
            raise RecipeError(f"E8P has 2, 3 or 4 bits, got {self.bits}")
        if not 0 <= self.neighbors <= 7:
            raise RecipeError(f"E8P tries 0 to 7 neighbors, got {self.neighbors}")

    @property
    def block(self) -> int:
        return 8

    @property
    def scales(self) -> tuple[float, float]:
        """(c, rho)."""
        return (_JOINT_SCALES if self.joint_scale else _CODEBOOK_SCALES)[self.bits]

    @property
    def search(self) -> tuple[int, float, int]:
        """Bits, gain and neighbors of the second stage."""
        second = _SECOND[self.bits]
        return second.bits if second else 0, self.scales[1], self.neighbors

    def fit(self, W: Tensor, *, importance: Tensor | None = None, gain: float = 1.0) -> FittedE8P:
        """One scale, gain * rms(W) / c; the lattice treats all columns alike.

        Raises:
            ShapeError, NumericalError: W is not a finite matrix, or so small or so large that
                its scale is no normal float32 number.
        """
        check_matrix(W, importance, gain)
        rms = W.double().square().mean().sqrt()
        scale = (rms * gain / self.scales[0]).float()
        if not torch.isfinite(scale) or (rms > 0 and scale < torch.finfo(torch.float32).tiny):
            raise NumericalError(
                f"a weight of rms {rms.item():.3e} has no float32 scale; multiply it by a constant"
            )
        return FittedE8P(self, (W.shape[0], W.shape[1]), scale.reshape(1))

    def layout(self, shape: tuple[int, int]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """One float32 scale, and 8 * bits bits for every 8 columns begun."""
        codes = shape[0] * -(-shape[1] // self.block) * self.bits
        return {"scale": (torch.float32, (1,)), "codes": (torch.uint8, (codes,))}

    def restore(self, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> FittedE8P:
        """From `FittedE8P.tensors()`; FormatError if it is not one positive float32 scale."""
        scale = checked_tensor(tensors, "scale", (1,), torch.float32)
        if scale < 0:
            raise FormatError(f"E8P scale must be >= 0, got {scale.item()}")
        return FittedE8P(self, shape, scale)


@dataclass(frozen=True, eq=False)
class FittedE8P:
    """E8P with its scale. Codes are (m, ceil(n / 8)) int64, first stage in the high bits.

    A last block of fewer than 8 columns is coded with zeros in place of the missing ones.
    A matrix of zeros has scale 0 and decodes to zeros.
    """

    quantizer: E8P
    shape: tuple[int, int]
    scale: Tensor

    @property
    def row_block(self) -> int:
        return 1

    @property
    def position_free(self) -> bool:
        return True

    def encode(self, x: Tensor, start: int = 0) -> Tensor:
        """Codes (m, ceil(d / 8)) of columns start .. start + d: the nearest ones at 2 bits, those

        of the search of `e8p_pairs` at 3 and 4. About 0.1 and 1 microsecond a code.
        """
        check_columns(x, self.shape, start, 8)
        check_finite(x, "the matrix to encode")
        y = x.float() / self._divisor.to(x.device)
        if x.shape[1] % 8:
            y = torch.nn.functional.pad(y, (0, -x.shape[1] % 8))
        return _nearest(y.reshape(-1, 8), self.quantizer).view(x.shape[0], -1)

    def decode(self, codes: Tensor, start: int = 0) -> Tensor:
        """Values (m, d), float32: float32(scale * float32(q1 + float32(q2 / rho)))."""
        check_codes(codes, 1 << 8 * self.quantizer.bits)
        points = _decode(codes.reshape(-1), self.quantizer).view(codes.shape[0], -1)
        width = min(points.shape[1], self.shape[1] - start)
        return points[:, :width] * self.scale.to(points.device)

    def round_panel(
        self, target: Tensor, base: Tensor, coupling: Tensor, start: int
    ) -> tuple[Tensor, Tensor]:
        """Codes and values of a run of columns with feedback (`core.protocols.RoundsPanels`)."""
        from convex_caldera.quantizers import e8p_panel_kernels

        check_columns(target, self.shape, start, 8)
        goal = target.contiguous().numpy().copy()
        scales = self._divisor.numpy()[0], self.scale.numpy()[0]
        codes, values = e8p_panel_kernels.round_panel(
            goal,
            base.contiguous().numpy(),
            coupling.contiguous().numpy(),
            scales,
            self.quantizer.search,
        )
        check_finite(torch.from_numpy(goal), "what the feedback made of the matrix")
        return torch.from_numpy(codes), torch.from_numpy(values)

    def take_rows(self, rows: slice) -> FittedE8P:
        return FittedE8P(self.quantizer, sliced_shape(self.shape, rows), self.scale)

    def pack(self, codes: Tensor) -> Tensor:
        """All first-stage codes, 2 bytes each, then the second stage's; little endian."""
        low_bytes = self.quantizer.bits - 2
        flat = codes.reshape(-1)
        planes = [_to_bytes(flat >> 8 * low_bytes, 2)]
        if low_bytes:
            planes.append(_to_bytes(flat & ((1 << 8 * low_bytes) - 1), low_bytes))
        return torch.cat(planes)

    def unpack(self, packed: Tensor) -> Tensor:
        m, blocks = self.shape[0], -(-self.shape[1] // 8)
        bits, count = self.quantizer.bits, m * blocks
        if packed.dtype != torch.uint8 or packed.shape != (count * bits,):
            raise FormatError(
                f"E8P codes of {self.shape} at {bits} bits are {count * bits} bytes,"
                f" got {packed.dtype} {tuple(packed.shape)}"
            )
        codes = _from_bytes(packed[: 2 * count], 2)
        if bits > 2:
            codes = codes << 8 * (bits - 2) | _from_bytes(packed[2 * count :], bits - 2)
        return codes.view(m, blocks)

    def tensors(self) -> dict[str, Tensor]:
        return {"scale": self.scale}

    @cached_property
    def _divisor(self) -> Tensor:
        return torch.where(self.scale > 0, self.scale, torch.inf)


def _nearest(y: Tensor, quantizer: E8P) -> Tensor:
    """Codes (N,) of y (N, 8) in units of the grid: compiled on the CPU, plain torch elsewhere."""
    second, rho = _SECOND[quantizer.bits], quantizer.scales[1]
    if y.device.type != "cpu":
        if second is None:
            return e8p_points.nearest_e8p(y)
        return e8p_pairs.nearest_pairs(y, second, rho, quantizer.neighbors)
    from convex_caldera.quantizers import e8p_kernels, e8p_pair_kernels

    x = y.detach().contiguous().numpy()
    if second is None:
        return torch.from_numpy(e8p_kernels.nearest_e8p(x))
    codes = e8p_pair_kernels.nearest_pairs(x, second.bits, rho, quantizer.neighbors)
    return torch.from_numpy(codes)


def _decode(codes: Tensor, quantizer: E8P) -> Tensor:
    """Points (N, 8) of combined codes (N,), float32, the same bits on every device."""
    second, rho = _SECOND[quantizer.bits], quantizer.scales[1]
    if second is None:
        return _decode_e8p(codes)
    first, rest = codes >> second.bits, codes & ((1 << second.bits) - 1)
    fine = _decode_e8p(rest) if second.bits == 16 else e8p_points.decode_ball(rest)
    return _decode_e8p(first) + fine * (1.0 / rho)


def _decode_e8p(codes: Tensor) -> Tensor:
    if codes.device.type != "cpu":
        return e8p_points.decode_e8p(codes)
    from convex_caldera.quantizers import e8p_kernels

    return torch.from_numpy(e8p_kernels.decode(codes.contiguous().numpy()))


def _to_bytes(codes: Tensor, width: int) -> Tensor:
    shifts = 8 * torch.arange(width, device=codes.device)
    return ((codes[:, None] >> shifts) & 255).to(torch.uint8).reshape(-1)


def _from_bytes(packed: Tensor, width: int) -> Tensor:
    shifts = 8 * torch.arange(width, device=packed.device)
    return (packed.view(-1, width).long() << shifts).sum(1)
