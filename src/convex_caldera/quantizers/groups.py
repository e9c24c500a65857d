"""Groups of weights that share a scale: runs of columns of one row, the last one ragged.

`group_size` g > 0 splits each row into ceil(n / g) runs; 0 makes the row one group (per output
channel) and -1 the whole matrix (per tensor). No width is refused: the last group of a row is
as long as what is left.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from convex_caldera.errors import FormatError, NumericalError, RecipeError, ShapeError
from convex_caldera.linalg.finite import all_finite

PER_ROW = 0
PER_TENSOR = -1
SCALE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def check_group_options(group_size: int, scale_dtype: str) -> None:
    """RecipeError unless the group size is >= -1 and the stored type is known."""
    if group_size < PER_TENSOR:
        raise RecipeError(
            f"group_size is > 0, {PER_ROW} (per row) or {PER_TENSOR} (per tensor), got {group_size}"
        )
    if scale_dtype not in SCALE_DTYPES:
        raise RecipeError(f"scale_dtype is one of {', '.join(SCALE_DTYPES)}, got {scale_dtype!r}")


@dataclass(frozen=True)
class Groups:
    """Which group each weight of an (m, n) matrix belongs to; per-group values are `grid`."""

    shape: tuple[int, int]
    group_size: int

    @property
    def width(self) -> int:
        """Columns of a full group."""
        n = self.shape[1]
        return min(self.group_size, n) if self.group_size > 0 else n

    @property
    def grid(self) -> tuple[int, int]:
        """Shape of a tensor with one value per group, (m, ceil(n / g)), (m, 1) or (1, 1)."""
        m, n = self.shape
        if self.group_size == PER_TENSOR:
            return 1, 1
        return m, -(-n // max(self.width, 1)) if self.group_size > 0 else 1

    def split(self, W: Tensor) -> Tensor:
        """W (m, n) as (rows, groups, members), ragged groups filled up with zeros."""
        count = self.grid[1]
        if self.group_size == PER_TENSOR:
            return W.reshape(1, 1, -1)
        spare = count * self.width - self.shape[1]
        return torch.nn.functional.pad(W, (0, spare)).reshape(W.shape[0], count, self.width)

    def spread(self, values: Tensor, start: int, size: int) -> Tensor:
        """Per-group values for the columns start .. start + size, broadcastable to (m, size)."""
        if values.shape[1] == 1:
            return values
        columns = torch.arange(start, start + size, device=values.device) // self.width
        return values[:, columns]

    def take_rows(self, values: Tensor, rows: slice) -> Tensor:
        """Per-group values of some rows."""
        return values if self.group_size == PER_TENSOR else values[rows]


def sliced_shape(shape: tuple[int, int], rows: slice) -> tuple[int, int]:
    """Shape after `take_rows`; ShapeError for a stepped or empty slice."""
    start, stop, step = rows.indices(shape[0])
    if step != 1 or stop <= start:
        raise ShapeError(f"rows must be a non-empty run of the {shape[0]} rows, got {rows}")
    return stop - start, shape[1]


def check_finite(x: Tensor, what: str) -> None:
    """NumericalError if x has NaN or infinite entries."""
    if not all_finite(x):
        count = int((~torch.isfinite(x)).sum())
        raise NumericalError(f"{what} has {count} NaN or infinite entries of {x.numel()}")


def check_matrix(W: Tensor, importance: Tensor | None, gain: float) -> None:
    """What every `fit` asks of its arguments: a finite matrix, weights >= 0, a positive gain."""
    if W.dim() != 2 or W.numel() == 0:
        raise ShapeError(f"a weight is a non-empty matrix (m, n), got {tuple(W.shape)}")
    check_finite(W, "the weight to quantize")
    if not gain > 0:
        raise RecipeError(f"gain multiplies the scale and must be positive, got {gain}")
    if importance is None:
        return
    if importance.shape != W.shape[1:]:
        raise ShapeError(
            f"importance has one entry per column, ({W.shape[1]},), got {tuple(importance.shape)}"
        )
    check_finite(importance, "the importance of the columns")
    if (importance < 0).any():
        raise NumericalError(f"importance must be >= 0, least is {float(importance.min()):.3e}")


def check_columns(x: Tensor, shape: tuple[int, int], start: int, block: int) -> None:
    """ShapeError unless x (m, d) may be columns start .. start + d of a matrix of `shape`."""
    m, n = shape
    if x.dim() != 2 or x.shape[0] != m or start < 0 or start + x.shape[1] > n:
        raise ShapeError(f"columns {start} .. of {shape} expected, got {tuple(x.shape)}")
    ends = start + x.shape[1] == n
    if start % block or (x.shape[1] % block and not ends):
        raise ShapeError(
            f"columns are coded in blocks of {block}; got {x.shape[1]} from column {start} of {n}"
        )


def check_codes(codes: Tensor, size: int) -> None:
    """FormatError if a code is not one of 0 .. size - 1."""
    if not codes.numel():
        return
    least, most = (int(extreme) for extreme in torch.aminmax(codes))
    if least < 0 or most >= size:
        raise FormatError(f"codes lie in 0 .. {size - 1}, got {least} .. {most}")


def round_scales(scales: Tensor, scale_dtype: str) -> Tensor:
    """Scales in their stored type.

    A group whose scale is below the stored type's range becomes coarser or zero; its error is
    then at most half the least positive number times the levels, which is nothing beside the
    other groups. A matrix that is small altogether would be lost that way, and is refused.

    Raises:
        NumericalError: a scale overflows the stored type, or the largest one is so small that
            rounding it would cost more than 3 percent.
    """
    dtype = SCALE_DTYPES[scale_dtype]
    largest = float(scales.abs().max())
    limits = torch.finfo(dtype)
    # the largest must stay a multiple of at least 16 units of the least subnormal
    floor = 16 * limits.smallest_normal * limits.eps
    if largest > limits.max or 0 < largest < floor:
        raise NumericalError(
            f"largest scale {largest:.3e} does not fit {scale_dtype}"
            f" ({floor:.1e} .. {limits.max:.1e});"
            " multiply the weight by a constant or choose scale_dtype float32"
        )
    return scales.to(dtype)


def checked_tensor(
    tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """A stored tensor of exactly this shape and type, finite; FormatError otherwise."""
    if name not in tensors:
        raise FormatError(f"no tensor {name!r} among {sorted(tensors)}")
    tensor = tensors[name]
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise FormatError(
            f"{name} must be {dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}"
        )
    if tensor.is_floating_point() and not all_finite(tensor):
        raise FormatError(f"{name} has NaN or infinite entries: altered file")
    return tensor
