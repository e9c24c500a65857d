"""The seams between rooms: what a quantizer and a transform must offer, and nothing more.

A *quantizer* is frozen data that says which reproduction points are meant ("E8P, 2 bits").
`fit` looks at a matrix and returns a *fitted quantizer*, which also knows the scales or tables
chosen for that matrix. Only a fitted quantizer can encode and decode.

Laws (tests/laws.py checks them for every entry of the quantizer table):
    decode(encode(decode(c))) == decode(c)       a codeword encodes to itself
    unpack(pack(codes)) == codes                 packing is lossless, `packed_bytes` long
    restore(shape, tensors()) decodes the same   nothing else is needed to read a file
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from convex_caldera.core.hessian import Hessian


@runtime_checkable
class Quantizer(Protocol):
    """Reproduction points and how codes are stored; a frozen dataclass, JSON-able fields only."""

    kind: ClassVar[str]

    @property
    def block(self) -> int:
        """Columns that one call of `encode` consumes at least (1 scalar, 8 E8P, 16 trellis)."""

    def fit(
        self, W: Tensor, *, importance: Tensor | None = None, gain: float = 1.0
    ) -> FittedQuantizer:
        """Choose scales or tables for W (m, n).

        `importance` (n,) weighs columns (usually the diagonal of H); `gain` multiplies the
        scale that the quantizer would choose by itself, for line searches from outside.
        What is chosen is rounded to its stored precision here, so that a reloaded layer
        decodes to the same values.
        """

    def layout(self, shape: tuple[int, int]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """What a matrix of `shape` will take on disk, before any data is seen: dtype and shape

        of every tensor of `FittedQuantizer.tensors()`, and of the packed codes as "codes".
        """

    def restore(self, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> FittedQuantizer:
        """Rebuild from `FittedQuantizer.tensors()`; raises FormatError if they do not fit."""


@runtime_checkable
class FittedQuantizer(Protocol):
    """A quantizer with its scales, for one matrix of `shape` (m, n)."""

    @property
    def quantizer(self) -> Quantizer: ...

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def row_block(self) -> int:
        """Rows that are coded together (1, or 16 for trellis tiles)."""

    @property
    def position_free(self) -> bool:
        """Whether encode and decode are the same at every place of the matrix (one scale)."""

    def encode(self, x: Tensor, start: int = 0) -> Tensor:
        """Nearest codes of x (m, d), the columns start .. start + d of the matrix.

        `start` is a multiple of `block`, d too unless the matrix ends there. Codes are a 2-D
        integer tensor whose column blocks concatenate along dimension 1.
        """

    def decode(self, codes: Tensor, start: int = 0) -> Tensor:
        """Values (m, d) in float32 of the codes of columns start .. start + d."""

    def take_rows(self, rows: slice) -> FittedQuantizer:
        """The same for a slice of the rows (bounds multiples of `row_block`); shares storage."""

    def pack(self, codes: Tensor) -> Tensor:
        """Codes of the whole matrix as a flat uint8 tensor, without waste inside."""

    def unpack(self, packed: Tensor) -> Tensor:
        """Inverse of `pack`; raises FormatError if the length is wrong or a code out of range."""

    def tensors(self) -> dict[str, Tensor]:
        """Everything stored beside the codes (scales, zero points, tables), by field name."""


@runtime_checkable
class RoundsPanels(Protocol):
    """A fitted quantizer that rounds a run of its blocks with feedback in one call."""

    def round_panel(
        self, target: Tensor, base: Tensor, coupling: Tensor, start: int
    ) -> tuple[Tensor, Tensor]:
        """What `fit.rounding.round_panel` says, for float32 on the CPU."""


@runtime_checkable
class Coder(Protocol):
    """Lossless entropy coding of packed codes; frozen data.

    Law: decode(encode(packed), packed.numel()) == packed, and every other stream is refused.
    """

    kind: ClassVar[str]

    @property
    def symbol_bits(self) -> int:
        """Width of the symbols that the packed stream is cut into, 1 to 8."""

    def encode(self, packed: Tensor) -> Tensor:
        """A flat uint8 stream as another one, usually shorter."""

    def decode(self, coded: Tensor, num_bytes: int) -> Tensor:
        """The stream of `num_bytes` back; raises FormatError if `coded` is not exactly one."""


@runtime_checkable
class RateLimited(Protocol):
    """A quantizer whose codes are meant for an entropy coder, and how long they may then be.

    Its fixed-width codes are wider than its rate. `fit` chooses levels so that the coded codes
    of nearest rounding take at most `most_coded_bytes`; drivers that round otherwise must check,
    and make what was fitted coarser by its `widened`.
    """

    def most_coded_bytes(self, shape: tuple[int, int]) -> int:
        """Bytes that the entropy-coded codes of a matrix may take, before any data is seen."""


@runtime_checkable
class Widens(Protocol):
    """What a `RateLimited` quantizer fits."""

    def widened(self, by: float) -> FittedQuantizer:
        """The same under a scale `by` times as large: about log2(by) bits per weight fewer."""


@runtime_checkable
class Transform(Protocol):
    """An invertible change of coordinates of a problem that preserves its loss; frozen data."""

    kind: ClassVar[str]

    def fit(
        self, W: Tensor, hessian: Hessian, *, seed: int, layer: str, site: str
    ) -> FittedTransform:
        """Choose signs, scales or orders. Layers of one input `site` get one input side."""

    def layout(self, shape: tuple[int, int]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of every tensor of `FittedTransform.tensors()`, from the shape alone."""

    def restore(self, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> FittedTransform:
        """Rebuild from `FittedTransform.tensors()`; raises FormatError if they do not fit."""


@runtime_checkable
class FittedTransform(Protocol):
    """W -> B W A^-1 and H -> A H A^T for invertible A (inputs) and orthogonal B (outputs)."""

    @property
    def transform(self) -> Transform: ...

    @property
    def shape(self) -> tuple[int, int]: ...

    def apply(self, W: Tensor) -> Tensor:
        """The matrix in the new coordinates, B W A^-1."""

    def invert(self, W: Tensor) -> Tensor:
        """Back again, B^-1 W A."""

    def apply_hessian(self, hessian: Hessian) -> Hessian:
        """A H A^T; the same object for the same input side, so factorizations are shared."""

    def apply_output(self, output: Hessian) -> Hessian:
        """B O B^T for the output side of a Kronecker curvature."""

    def inputs(self, x: Tensor) -> Tensor:
        """Activations (..., n) -> A x."""

    def outputs(self, y: Tensor) -> Tensor:
        """Outputs of the inner matrix (..., m) -> B^-1 y."""

    def tensors(self) -> dict[str, Tensor]:
        """Everything stored, by field name."""
