"""Trellis-coded quantization: every weight a function of a window of the bit stream.

A tile of 16 x 16 weights is one walk through a trellis with 2^L states; each weight costs K new
bits and is reproduced by the level of the L-bit state that they complete, so that the decoder
is a window and a function (`trellis_stream` is the normative format, `trellis_codes` the
levels) and the encoder is free to search as hard as it likes: the format does not know how.

    W^_ij = scale_i * level(state_ij)

Sources: Tseng et al., QTIP, arXiv 2406.11235 (bit-shift trellis, computed codes, tail-biting);
Marcellin and Fischer, 1990 (trellis-coded quantization). Differs: rates in sixteenths of a bit
within one trellis, tiles chained into one long stream on request, tiles cut to the matrix
instead of padded, and exact search over sixteen tiles at once in vector lanes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal, final, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from convex_caldera.errors import FormatError, RecipeError, ShapeError
from convex_caldera.quantizers import trellis_stream
from convex_caldera.quantizers.groups import (
    check_columns,
    check_finite,
    check_matrix,
    checked_tensor,
    sliced_shape,
)
from convex_caldera.quantizers.trellis_codes import (
    BYTE_SUM_CODES,
    MAX_STORED_BITS,
    Code,
    CodeName,
    best_spread,
    designed_multiplier,
)
from convex_caldera.quantizers.trellis_stream import RATE_UNIT, TILE, Tiling

MAX_VITERBI_BITS = 16  # 2^L states are visited; also the most a row of 16 weights can close
MAX_STATE_BITS = 28  # the product of a longer state would forget its oldest bits
MAX_SURVIVORS = 1 << 20
BEAM_CODES = ("weyl", *BYTE_SUM_CODES)
TARGET_LIMIT = 16.0  # standard deviations; no level lies beyond 4, so none is missed


@final
@dataclass(frozen=True)
class Trellis:
    """A bit-shift trellis at `bits` bits a weight.

    Args:
        bits: 1 to 8 in steps of 1/16; fractional rates alternate between integer ones.
        state_bits: L, the memory.
        code: name of the level function in `trellis_codes`; "table" stores 2^L trained levels.
        chain: 0 for tail-biting tiles, c > 0 for streams over c tile rows of a column block.
        encoder: "viterbi" (exact, L <= 16) or "beam" (any L up to 28, chained).
        survivors: paths that the beam keeps; more is better and slower.
        row_scales: a float16 factor for every row beside the float32 scale of the matrix.

    Law: decode depends on `bits`, `state_bits`, `code`, `chain` and the scales alone.
    """

    kind: ClassVar[str] = "trellis"

    bits: float = 2.0
    state_bits: int = 14
    code: CodeName = "weyl"
    chain: int = 0
    encoder: Literal["viterbi", "beam"] = "viterbi"
    survivors: int = 4096
    row_scales: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8 or self.bits * RATE_UNIT % 1:
            raise RecipeError(f"bits are 1 to 8 in steps of 1/{RATE_UNIT}, got {self.bits}")
        if self.chain < 0:
            raise RecipeError(f"chain counts tile rows and is >= 0, got {self.chain}")
        if self.encoder not in ("viterbi", "beam"):
            raise RecipeError(f"encoder is viterbi or beam, got {self.encoder!r}")
        beam = self.encoder == "beam"
        least, most = math.ceil(self.bits) + 1, MAX_STATE_BITS if beam else MAX_VITERBI_BITS
        if self.code == "table":
            most = MAX_STORED_BITS
        if not least <= self.state_bits <= most:
            raise RecipeError(
                f"state_bits lies between {least} (more than the bits of a weight) and {most}"
                f" for the {self.encoder} encoder and code {self.code}, got {self.state_bits}"
            )
        if beam and (self.chain == 0 or self.code not in BEAM_CODES):
            raise RecipeError(
                f"the beam needs chain >= 1 and a code of {', '.join(BEAM_CODES)},"
                f" got chain {self.chain} and code {self.code!r}"
            )
        if not 1 <= self.survivors <= MAX_SURVIVORS:
            raise RecipeError(f"survivors lie between 1 and {MAX_SURVIVORS}, got {self.survivors}")
        if self.code not in get_args(CodeName):
            known = ", ".join(get_args(CodeName))
            raise RecipeError(f"unknown trellis code {self.code!r}; one of {known}")

    @property
    def block(self) -> int:
        return TILE

    @property
    def sixteenths(self) -> int:
        """Bits of a full tile's row."""
        return round(self.bits * RATE_UNIT)

    def fit(
        self, W: Tensor, *, importance: Tensor | None = None, gain: float = 1.0
    ) -> FittedTrellis:
        check_matrix(W, importance, gain)
        power = W.double().square()
        if importance is not None and float(importance.sum()) > 0:
            weights = importance.double() / importance.double().mean()
            power = power * weights
        rms = power.mean().sqrt()
        sigma = Code(self.code, self.state_bits).sigma
        scale = (gain * best_spread(self.bits) * rms / sigma).float().reshape(1)
        rows = multiplier = levels = None
        if self.row_scales:
            ratio = power.mean(dim=1).sqrt() / rms if rms > 0 else W.new_ones(W.shape[0])
            rows = ratio.clamp(max=6e4).half()
        if self.code == "weyl":
            multiplier = torch.tensor(
                [designed_multiplier(self.state_bits, self.bits)], dtype=torch.uint32
            )
        if self.code == "table":
            from convex_caldera.quantizers.trellis_table import trained_levels

            trained = trained_levels(self.state_bits, self.sixteenths)
            levels = torch.from_numpy(trained.copy()).to(W.device)
        return FittedTrellis(self, (W.shape[0], W.shape[1]), scale, rows, multiplier, levels)

    def layout(self, shape: tuple[int, int]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """A float32 scale, a float16 one a row if asked for, what the code stores, all streams.

        That is weyl's word, or 2^L float16 levels of a table.
        """
        layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "scale": (torch.float32, (1,)),
            "codes": (torch.uint8, (Tiling(shape, self.sixteenths).packed_bytes,)),
        }
        if self.row_scales:
            layout["row_scale"] = (torch.float16, (shape[0],))
        if self.code == "weyl":
            layout["multiplier"] = (torch.uint32, (1,))
        if self.code == "table":
            layout["levels"] = (torch.float16, (1 << self.state_bits,))
        return layout

    def restore(self, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> FittedTrellis:
        given = dict(tensors)
        scale = checked_tensor(given, "scale", (1,), torch.float32)
        rows = multiplier = levels = None
        if self.row_scales:
            rows = checked_tensor(given, "row_scale", (shape[0],), torch.float16)
        if self.code == "weyl":
            multiplier = checked_tensor(given, "multiplier", (1,), torch.uint32).cpu()
        if self.code == "table":
            levels = checked_tensor(given, "levels", (1 << self.state_bits,), torch.float16)
        return FittedTrellis(self, shape, scale, rows, multiplier, levels)


@final
@dataclass(frozen=True, eq=False)
class FittedTrellis:
    """A trellis with its scales. Codes are uint8 (tile rows, column blocks x tile bytes).

    The word `multiplier` stays on the CPU, where formulas are chosen; all else is where it was.
    `levels` (2^L,) are those of a table, float16 but while they are fine-tuned: decoding is
    differentiable in them as it is in the scales.
    On the CPU kernels are compiled (`trellis_viterbi`, `trellis_bits`), elsewhere plain torch
    does the same (`trellis_torch`). The beam runs on the CPU alone: targets go there, codes back.
    """

    quantizer: Trellis
    shape: tuple[int, int]
    scale: Tensor
    row_scale: Tensor | None
    multiplier: Tensor | None
    levels: Tensor | None

    @cached_property
    def code(self) -> Code:
        """The level of every state."""
        word = 0 if self.multiplier is None else int(self.multiplier.long())
        stored = b""
        if self.levels is not None:
            stored = self.levels.detach().half().cpu().numpy().astype("<f2").tobytes()
        return Code(self.quantizer.code, self.quantizer.state_bits, word, stored)

    @property
    def row_block(self) -> int:
        """16, or the rows of a chain: streams start there."""
        return TILE * max(self.quantizer.chain, 1)

    @property
    def position_free(self) -> bool:
        """Whole tiles are alike everywhere unless rows have scales of their own."""
        return self.row_scale is None

    @cached_property
    def _tiling(self) -> Tiling:
        return Tiling(self.shape, self.quantizer.sixteenths)

    @cached_property
    def _scales(self) -> Tensor:
        """What a level is multiplied by in each row, (m or 1, 1) float32."""
        return (self.scale if self.row_scale is None else self.scale * self.row_scale.float())[
            :, None
        ]

    def encode(self, x: Tensor, start: int = 0) -> Tensor:
        check_columns(x, self.shape, start, TILE)
        check_finite(x, "the target to encode")
        unit = self._scales.to(x.device) * self.code.sigma
        target = torch.where(unit > 0, x.float() / torch.where(unit > 0, unit, 1.0), 0.0)
        return self._search(target.clamp(-TARGET_LIMIT, TARGET_LIMIT))

    def _search(self, x: Tensor) -> Tensor:
        """Codes of targets x (m, d) in standard deviations of the code, where x is."""
        m, d = x.shape
        step = self._tiling.tile_bytes
        shape = (-(-m // TILE), -(-d // TILE) * step)
        codes = torch.zeros(shape, dtype=torch.uint8, device=x.device)
        tall, wide = m - m % self.row_block, d - d % TILE
        # the full tiles or chains, then the short ones below, right, and in the corner
        for rows in (slice(0, tall), slice(tall, m)):
            for cols in (slice(0, wide), slice(wide, d)):
                if rows.stop > rows.start and cols.stop > cols.start:
                    tiles = slice(rows.start // TILE, -(-rows.stop // TILE))
                    bytes_ = slice(cols.start // TILE * step, -(-cols.stop // TILE) * step)
                    codes[tiles, bytes_] = self._search_equal(x[rows, cols])
        return codes

    def _search_equal(self, x: Tensor) -> Tensor:
        """Codes of an area whose streams are equally long: full ones, or one row of short ones."""
        m, d = x.shape
        height, width = min(m, self.row_block), min(d, TILE)
        streams = x.reshape(m // height, height, d // width, width).transpose(1, 2)
        streams = streams.reshape(-1, height * width)
        heights = [min(TILE, height - i) for i in range(0, height, TILE)]
        per_tile = [trellis_stream.step_bits(self.quantizer.sixteenths, h * width) for h in heights]
        coded = self._coded_elsewhere if self._on_device(x, per_tile) else self._coded_on_cpu
        blocks = coded(streams, per_tile).to(x.device)
        blocks = blocks.view(m // height, d // width, len(heights), -1).transpose(1, 2)
        return blocks.reshape((m // height) * len(heights), -1)

    def _on_device(self, x: Tensor, per_tile: list[NDArray[np.int64]]) -> bool:
        """Whether the search runs where x is: not for beams, nor for streams below one state."""
        q = self.quantizer
        short = q.chain == 0 and int(per_tile[0].sum()) < q.state_bits
        return x.device.type != "cpu" and q.encoder == "viterbi" and not short

    def _coded_on_cpu(self, streams: Tensor, per_tile: list[NDArray[np.int64]]) -> Tensor:
        """Bytes (streams, tiles, tile bytes) of streams, on the CPU, by compiled searches."""
        from convex_caldera.quantizers import trellis_beam, trellis_bits, trellis_viterbi

        q, x, steps = self.quantizer, streams.cpu().numpy(), np.concatenate(per_tile)
        if q.encoder == "beam":
            symbols = trellis_beam.search(x, steps, self.code, q.survivors)
        else:
            levels = self.code.table() / np.float32(self.code.sigma)
            symbols = trellis_viterbi.search(x, steps, levels, q.state_bits, q.chain > 0)
        out = np.zeros((len(x), len(per_tile), self._tiling.tile_bytes), np.uint8)
        at = 0
        for i, part in enumerate(per_tile):
            trellis_bits.write_symbols(symbols[:, at : at + len(part)], part, out[:, i])
            at += len(part)
        return torch.from_numpy(out)

    def _coded_elsewhere(self, streams: Tensor, per_tile: list[NDArray[np.int64]]) -> Tensor:
        """The same by exact search in torch, on the streams' device."""
        from convex_caldera.quantizers import trellis_torch

        q, size = self.quantizer, self._tiling.tile_bytes
        levels = trellis_torch.unit_levels(self.code, streams.device)
        steps = np.concatenate(per_tile)
        symbols = trellis_torch.search(streams, steps, levels, q.state_bits, q.chain > 0)
        parts = symbols.split([len(part) for part in per_tile], dim=1)
        pairs = zip(parts, per_tile, strict=True)
        return torch.stack([trellis_torch.write_symbols(p, k, size) for p, k in pairs], 1)

    def decode(self, codes: Tensor, start: int = 0) -> Tensor:
        q, (m, n), step = self.quantizer, self.shape, self._tiling.tile_bytes
        blocks = codes.shape[-1] // step if codes.dim() == 2 else 0
        if codes.shape != (-(-m // TILE), blocks * step) or codes.dtype != torch.uint8:
            raise ShapeError(
                f"codes of {self.shape} are uint8 ({-(-m // TILE)}, blocks x {step}),"
                f" got {codes.dtype} {tuple(codes.shape)}"
            )
        shape = (m, min(blocks * TILE, n - start))
        table = None if self.levels is None else self.levels.to(codes.device).float()
        if codes.device.type != "cpu":
            from convex_caldera.quantizers import trellis_torch

            levels = trellis_torch.decode(codes, shape, q.sixteenths, self.code, q.chain, table)
        else:
            states = self._states(codes.numpy(), shape)
            if table is None:
                levels = torch.from_numpy(self.code.levels(states))
            else:
                levels = table[torch.from_numpy(states.view(np.int32))]
        return self._scales.to(codes.device) * levels

    def _states(self, codes: NDArray[np.uint8], shape: tuple[int, int]) -> NDArray[np.uint32]:
        """States (m, d) of the weights whose codes these are."""
        from convex_caldera.quantizers import trellis_bits

        q, (m, d), step = self.quantizer, shape, self._tiling.tile_bytes
        states = np.empty((m, d), np.uint32)
        for i in range(-(-d // TILE)):
            cols = slice(TILE * i, min(TILE * (i + 1), d))
            width = cols.stop - cols.start
            block = codes[:, i * step : (i + 1) * step]
            trellis_bits.read_states(
                block, m, width, q.sixteenths, q.state_bits, q.chain, states[:, cols]
            )
        return states

    def take_rows(self, rows: slice) -> FittedTrellis:
        shape = sliced_shape(self.shape, rows)
        first, last, _ = rows.indices(self.shape[0])
        if first % self.row_block or (last % self.row_block and last != self.shape[0]):
            raise ShapeError(f"rows are coded in runs of {self.row_block}, got {rows}")
        rows_of = None if self.row_scale is None else self.row_scale[rows]
        return FittedTrellis(
            self.quantizer, shape, self.scale, rows_of, self.multiplier, self.levels
        )

    def pack(self, codes: Tensor) -> Tensor:
        flat = codes.reshape(-1)
        return flat.clone() if self._whole else flat[self._stored.to(codes.device)]

    def unpack(self, packed: Tensor) -> Tensor:
        if packed.dim() != 1 or packed.dtype != torch.uint8:
            raise FormatError(f"trellis codes are flat uint8, got {packed.dtype} {packed.shape}")
        if packed.numel() != self._tiling.packed_bytes:
            raise FormatError(
                f"trellis codes of {self.shape} at {self.quantizer.bits} bits take"
                f" {self._tiling.packed_bytes} bytes, got {packed.numel()}"
            )
        tiles = -(-self.shape[0] // TILE)
        if self._whole:
            return packed.view(tiles, -1).clone()
        spare = torch.from_numpy(self._tiling.spare_bits()).to(packed.device)
        codes = torch.zeros(spare.numel(), dtype=torch.uint8, device=packed.device)
        codes[self._stored.to(packed.device)] = packed
        if (codes.view_as(spare) & spare).any():
            raise FormatError("spare bits behind a trellis tile are not 0: altered file")
        return codes.view_as(spare)

    @property
    def _whole(self) -> bool:
        """Whether all tiles are full, so that every byte of the codes is stored."""
        return not any(size % TILE for size in self.shape)

    @cached_property
    def _stored(self) -> Tensor:
        """Places of the stored bytes among those of the flattened codes, int64, on the CPU."""
        return torch.from_numpy(np.flatnonzero(self._tiling.byte_mask()))

    def tensors(self) -> dict[str, Tensor]:
        found = {
            "scale": self.scale,
            "row_scale": self.row_scale,
            "multiplier": self.multiplier,
            "levels": self.levels,
        }
        return {name: tensor for name, tensor in found.items() if tensor is not None}
