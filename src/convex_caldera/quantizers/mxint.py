"""MXINT: small integers that share a power-of-two scale per block (LQER, arXiv 2402.02446).

A block of weights with largest magnitude M has one exponent E; its values are

    q 2^(E - (b - 2)),   |q| <= 2^(b-1) - 1,   sign and magnitude, so q = -2^(b-1) is not used

and lie below 2^(E + 1). Two rules choose E, and differ only where M is a power of two itself:

    ocp      E = floor(log2 M)        M is a grid point (OCP MX, and the code of QERA)
    legacy   E = ceil(log2 M) - 1     M saturates: 12.5 % error at 4 bits (the code of LQER)

Rounding is half to even. With fewer than 8 exponent bits, exponents count from one base of the
whole matrix, placed so that the largest fits; blocks below the base are rounded on its grid.

Differs from LQER's code: no 1e-9 is added before rounding, nothing near zero is passed through
unrounded, and the bias of short exponents is fitted instead of fixed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from convex_caldera.coding.bitpack import pack_bits, packed_bytes, unpack_bits
from convex_caldera.errors import FormatError, RecipeError
from convex_caldera.quantizers.grouped import ScalarCodes
from convex_caldera.quantizers.groups import (
    PER_TENSOR,
    Groups,
    check_columns,
    check_finite,
    check_matrix,
    checked_tensor,
    sliced_shape,
)

ExponentRule = Literal["ocp", "legacy"]

BIAS = 127  # of a stored exponent, as in OCP's E8M0
LEAST_EXPONENT, MOST_EXPONENT = -BIAS, 127
EXPONENT_BITS = 8


@dataclass(frozen=True)
class MXInt:
    """Integers of `bits` bits, sign included, with one shared exponent per block of a row.

    Args:
        bits: 2 to 8.
        group_size: block, columns of a row that share an exponent; 0 the whole row, -1 the matrix.
        exponent_bits: 2 to 8; below 8 a base of one byte is stored with the matrix.
        exponent_rule: "ocp" or "legacy", see above; what is stored reads the same for both.

    Raises:
        RecipeError: an option out of range.
    """

    bits: int = 4
    group_size: int = 32
    exponent_bits: int = EXPONENT_BITS
    exponent_rule: ExponentRule = "ocp"

    kind: ClassVar[str] = "mxint"

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise RecipeError(f"MXINT has 2 to 8 bits, sign included, got {self.bits}")
        if self.group_size < PER_TENSOR:
            raise RecipeError(f"group_size is > 0, 0 (row) or -1 (matrix), got {self.group_size}")
        if not 2 <= self.exponent_bits <= EXPONENT_BITS:
            raise RecipeError(f"MXINT exponents have 2 to 8 bits, got {self.exponent_bits}")
        if self.exponent_rule not in ("ocp", "legacy"):
            raise RecipeError(f"exponent_rule is ocp or legacy, got {self.exponent_rule!r}")

    @property
    def block(self) -> int:
        return 1

    @property
    def largest(self) -> int:
        """The largest magnitude q, 2^(bits - 1) - 1; also the code of zero."""
        return (1 << (self.bits - 1)) - 1

    def fit(self, W: Tensor, *, importance: Tensor | None = None, gain: float = 1.0) -> FittedMXInt:
        """The exponent of gain * max |W| of each block; importance changes nothing.

        Raises:
            ShapeError, NumericalError: W is not a finite matrix.
        """
        check_matrix(W, importance, gain)
        shape = (W.shape[0], W.shape[1])
        largest = Groups(shape, self.group_size).split(W.float()).abs().amax(-1)
        exponents = shared_exponents(largest * gain, self.exponent_rule)
        if self.exponent_bits < EXPONENT_BITS:
            base = int(exponents.max()) - ((1 << self.exponent_bits) - 1)
            exponents = exponents.clamp(min=max(base, LEAST_EXPONENT))
        return FittedMXInt(self, shape, exponents)

    def layout(self, shape: tuple[int, int]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Exponents as a bit stream, their base if they are short, and packed codes."""
        grid = Groups(shape, self.group_size).grid
        layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "codes": (torch.uint8, (packed_bytes(shape[0] * shape[1], self.bits),)),
            "exponents": (torch.uint8, (packed_bytes(grid[0] * grid[1], self.exponent_bits),)),
        }
        if self.exponent_bits < EXPONENT_BITS:
            layout["base"] = (torch.uint8, (1,))
        return layout

    def restore(self, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> FittedMXInt:
        """From `FittedMXInt.tensors()`; FormatError if lengths, types or exponents are wrong."""
        grid = Groups(shape, self.group_size).grid
        count = grid[0] * grid[1]
        length = packed_bytes(count, self.exponent_bits)
        packed = checked_tensor(tensors, "exponents", (length,), torch.uint8)
        stored = unpack_bits(packed, self.exponent_bits, count).view(grid).to(torch.int32)
        if self.exponent_bits < EXPONENT_BITS:
            stored = stored + int(checked_tensor(tensors, "base", (1,), torch.uint8))
        exponents = stored - BIAS
        if int(exponents.max()) > MOST_EXPONENT:
            raise FormatError(f"exponents are at most {MOST_EXPONENT}, got {int(exponents.max())}")
        return FittedMXInt(self, shape, exponents)


@dataclass(frozen=True, eq=False)
class FittedMXInt(ScalarCodes):
    """MXInt with its exponents E (int32, one per block). Codes are (m, n) uint8, q + largest."""

    quantizer: MXInt
    shape: tuple[int, int]
    exponents: Tensor

    @property
    def position_free(self) -> bool:
        return self.exponents.numel() == 1

    @property
    def steps(self) -> Tensor:
        """Spacing of each block's grid, 2^(E - (bits - 2)), float32 and exact."""
        return power_of_two(self.exponents - (self.quantizer.bits - 2))

    def encode(self, x: Tensor, start: int = 0) -> Tensor:
        """Nearest codes (m, d) of columns start .. start + d."""
        check_columns(x, self.shape, start, 1)
        check_finite(x, "the matrix to encode")
        most = self.quantizer.largest
        step = self._steps(start, x.shape[1], x.device)
        q = (x.float().double() / step).round().clamp(-most, most)
        return (q + most).to(torch.uint8)

    def decode(self, codes: Tensor, start: int = 0) -> Tensor:
        """Values (m, d), float32: (code - largest) * step."""
        step = self._steps(start, codes.shape[1], codes.device)
        return (codes.float() - self.quantizer.largest) * step

    def take_rows(self, rows: slice) -> FittedMXInt:
        groups = Groups(self.shape, self.quantizer.group_size)
        exponents = groups.take_rows(self.exponents, rows)
        return FittedMXInt(self.quantizer, sliced_shape(self.shape, rows), exponents)

    def unpack(self, packed: Tensor) -> Tensor:
        codes = super().unpack(packed)
        top = 2 * self.quantizer.largest
        if int(codes.max()) > top:
            raise FormatError(f"codes lie in 0 .. {top}, got {int(codes.max())}")
        return codes

    def tensors(self) -> dict[str, Tensor]:
        """`exponents` packed in their bits; `base`, the least of them, if these are not 8."""
        width = self.quantizer.exponent_bits
        stored = self.exponents.cpu() + BIAS
        if width == EXPONENT_BITS:
            return {"exponents": stored.to(torch.uint8).flatten()}
        base = max(int(stored.max()) - ((1 << width) - 1), 0)
        return {
            "base": torch.tensor([base], dtype=torch.uint8),
            "exponents": pack_bits((stored - base).to(torch.uint8), width),
        }

    def _steps(self, start: int, size: int, device: torch.device) -> Tensor:
        groups = Groups(self.shape, self.quantizer.group_size)
        return groups.spread(self.steps.to(device), start, size)


def shared_exponents(largest: Tensor, rule: ExponentRule) -> Tensor:
    """E (int32) of blocks whose largest magnitudes are given; the least one where they are 0."""
    mantissa, exponent = torch.frexp(largest.float())  # M = mantissa 2^exponent, 1/2 <= mantissa
    E = exponent.to(torch.int32) - 1
    if rule == "legacy":
        E = torch.where(mantissa == 0.5, E - 1, E)
    E = torch.where(largest == 0, LEAST_EXPONENT, E)
    return E.clamp(LEAST_EXPONENT, MOST_EXPONENT)


def power_of_two(exponents: Tensor) -> Tensor:
    """2^e in float32, exact for -149 <= e <= 127."""
    return torch.ldexp(torch.ones_like(exponents, dtype=torch.float64), exponents).float()


def round_blocks(x: Tensor, quantizer: MXInt) -> Tensor:
    """x (..., n) rounded to the nearest MXINT values in blocks along the last axis, float32.

    What `fit`, `encode` and `decode` give, in one pass and without codes; for activations, whose
    blocks are fitted anew in every forward. Blocks need 8 exponent bits and group_size >= 0.
    NaN and infinite entries stay in their own block.
    """
    n = x.shape[-1]
    width = min(quantizer.group_size, n) if quantizer.group_size > 0 else n
    blocks = torch.nn.functional.pad(x.float(), (0, -n % width)).unflatten(-1, (-1, width))
    E = shared_exponents(blocks.abs().amax(-1, keepdim=True), quantizer.exponent_rule)
    step = power_of_two(E - (quantizer.bits - 2))
    most = quantizer.largest
    # dividing by a power of two is exact but for subnormal steps, whose inverse overflows
    q = (blocks.double() / step).round().clamp(-most, most).float()
    return (q * step).flatten(-2)[..., :n]
