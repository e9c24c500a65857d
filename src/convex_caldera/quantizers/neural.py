"""Neural codes: patches of a matrix as small embeddings, and one decoder that unfolds them.

    V (m, n) in patches,   patch = D(embedding),   embedding on `embed_bits`, D on `decoder_bits`

V is a matrix within about [-1, 1]: inside `double_scale`, which divides each group of weights by
its largest. The decoder is fitted to the matrix and stored with it, or, with a `home`, it is the
one stored with the layer of that name: several matrices then share one. Values are decoded in
float64 and rounded to float32; the last decoded matrix is kept, since decoding takes a forward
pass of the decoder.

Source: Leconte et al., ReALLM, arXiv 2405.13155 (an embedding per patch and a shared decoder);
Chen et al., HNeRV, arXiv 2304.02633 (its architecture). See `neural_decoder` and
`neural_training` for where this differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from convex_caldera.coding.bitpack import pack_bits, packed_bytes, unpack_bits
from convex_caldera.core.protocols import FittedQuantizer, Quantizer
from convex_caldera.errors import FormatError, NumericalError, RecipeError, ShapeError
from convex_caldera.quantizers.groups import check_finite, check_matrix, checked_tensor
from convex_caldera.quantizers.kmeans import floored
from convex_caldera.quantizers.nested import INNER, Layout
from convex_caldera.quantizers.neural_decoder import Decoder, DecoderShape
from convex_caldera.quantizers.neural_embedding import embed, embedding_values
from convex_caldera.quantizers.neural_encoder import Encoder
from convex_caldera.quantizers.neural_patches import patches_of, unpatched
from convex_caldera.quantizers.neural_training import Training, train

WHOLE = 1 << 30  # columns that one call of `encode` consumes: all of them
LARGEST = 1.5  # values beyond which a matrix was not divided by its scales


@dataclass(frozen=True)
class Neural:
    """An autoencoder's codes; the architecture is `neural_decoder.DecoderShape`.

    Args:
        patch: side of the square patches; the rim of a matrix is filled up with zeros.
        channels: of an embedding.
        enc_strides: of the encoder's stages; an embedding has patch / prod(enc_strides) rows.
        dec_strides: of the decoder's; their product divides the encoder's.
        width: channels after the decoder's first layer (HNeRV's fc_dim).
        kernels: of the decoder's first and last stage, odd.
        least_width: channels below which no stage of the decoder falls (HNeRV: 12).
        decoder_bits: 2 to 8 per decoder weight.
        embed_bits: 1 to 8 per embedding value.
        home: name of the layer that stores the decoder; empty if this one does.
        encoder_width, epochs, rate, seed: of the training.
        refinements: steps of descent on each embedding for the finished decoder.

    Raises:
        RecipeError: an option out of range, or strides that do not fit.
    """

    patch: int = 32
    channels: int = 4
    enc_strides: tuple[int, ...] = (2,)
    dec_strides: tuple[int, ...] = (2,)
    width: int = 16
    kernels: tuple[int, int] = (1, 3)
    least_width: int = 4
    decoder_bits: int = 6
    embed_bits: int = 3
    home: str = ""
    encoder_width: int = 32
    epochs: int = 10
    rate: float = 2e-3
    seed: int = 1
    refinements: int = 4

    kind: ClassVar[str] = "neural"

    def __post_init__(self) -> None:
        _ = self.geometry
        if not 2 <= self.decoder_bits <= 8 or not 1 <= self.embed_bits <= 8:
            raise RecipeError(
                f"decoder weights have 2 to 8 bits and embeddings 1 to 8, got {self.decoder_bits} "
                f"and {self.embed_bits}"
            )
        if min(self.epochs, self.encoder_width) < 1 or not self.rate > 0 or self.refinements < 0:
            raise RecipeError(
                f"epochs, encoder_width and rate are positive and refinements >= 0, got "
                f"{self.epochs}, {self.encoder_width}, {self.rate}, {self.refinements}"
            )

    @property
    def geometry(self) -> DecoderShape:
        return DecoderShape(
            self.patch, self.channels, self.enc_strides, self.dec_strides, self.width, self.kernels,
            self.least_width,
        )  # fmt: skip

    @property
    def training(self) -> Training:
        return Training(
            self.decoder_bits,
            self.embed_bits,
            self.encoder_width,
            self.epochs,
            self.rate,
            self.seed,
        )

    @property
    def block(self) -> int:
        return WHOLE

    @property
    def symbol_bits(self) -> int:
        """Bits of one code, an embedding's value."""
        return self.embed_bits

    @property
    def bits(self) -> float:
        """Embedding bits per weight of a patch; the decoder comes on top."""
        return self.embed_bits * self.geometry.embedding / self.patch**2

    def patches(self, shape: tuple[int, int]) -> int:
        """How many cover a matrix."""
        return -(-shape[0] // self.patch) * -(-shape[1] // self.patch)

    def fit(
        self, W: Tensor, *, importance: Tensor | None = None, gain: float = 1.0
    ) -> FittedNeural:
        """A decoder trained on W (m, n) alone.

        Raises:
            RecipeError: a home is named, whose decoder is not at hand; or a gain, for which
                there is no scale here.
            ShapeError, NumericalError: W is no finite matrix within [-1.5, 1.5].
        """
        if self.home:
            raise RecipeError(f"the decoder of {self.home} must be trained first (TrainedNeural)")
        weights = _checked(W, importance, gain)
        patches = patches_of(W.float().cpu(), self.patch, weights)
        decoder, encoder = train(patches, self.geometry, self.training)
        return FittedNeural(self, (W.shape[0], W.shape[1]), decoder, encoder, weights)

    @property
    def borrows(self) -> Layout:
        """Tensors that `restore` needs and another layer stores."""
        return self.geometry.layout(self.decoder_bits) if self.home else {}

    def layout(self, shape: tuple[int, int]) -> Layout:
        """Embedding codes as one bit stream; the decoder unless it has another home."""
        count = self.patches(shape) * self.geometry.embedding
        own = {} if self.home else self.geometry.layout(self.decoder_bits)
        return {"codes": (torch.uint8, (packed_bytes(count, self.embed_bits),)), **own}

    def restore(self, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> FittedNeural:
        """From the decoder's tensors, stored here or borrowed; FormatError if they do not fit."""
        found = {
            name: checked_tensor(tensors, name, size, dtype)
            for name, (dtype, size) in self.geometry.layout(self.decoder_bits).items()
        }
        decoder = Decoder.restore(self.geometry, self.decoder_bits, found)
        return FittedNeural(self, shape, decoder)


@dataclass(frozen=True)
class TrainedNeural:
    """Neural with a decoder that was trained beforehand, on this matrix among others.

    What it fits has `record` for its quantizer, so nothing of this class is ever stored.
    """

    record: Neural
    decoder: Decoder
    encoder: Encoder | None = None

    kind: ClassVar[str] = "neural"

    @property
    def block(self) -> int:
        return WHOLE

    @property
    def bits(self) -> float:
        return self.record.bits

    def fit(
        self, W: Tensor, *, importance: Tensor | None = None, gain: float = 1.0
    ) -> FittedNeural:
        """The given decoder for W; embeddings are found by `encode`."""
        weights = _checked(W, importance, gain)
        shape = (W.shape[0], W.shape[1])
        return FittedNeural(self.record, shape, self.decoder, self.encoder, weights)

    def layout(self, shape: tuple[int, int]) -> Layout:
        return self.record.layout(shape)

    def restore(self, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> FittedNeural:
        return self.record.restore(shape, tensors)


@dataclass(frozen=True, eq=False)
class FittedNeural:
    """A decoder for one matrix. Codes are (patches, values of an embedding), uint8.

    With an encoder, which a restored one does not have, `encode` starts from its embeddings.
    """

    quantizer: Neural
    shape: tuple[int, int]
    decoder: Decoder
    encoder: Encoder | None = None
    importance: Tensor | None = None
    _last: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def row_block(self) -> int:
        return 1

    @property
    def position_free(self) -> bool:
        return False

    def encode(self, x: Tensor, start: int = 0) -> Tensor:
        """Codes of the whole matrix: embeddings refined by descent under the fixed decoder."""
        self._check_whole(tuple(x.shape) == self.shape, start)
        check_finite(x, "the matrix to encode")
        patches = patches_of(x.float().cpu(), self.quantizer.patch, self.importance)
        core = self.quantizer
        codes = embed(patches, self.decoder, self.encoder, core.embed_bits, core.refinements)
        return codes.flatten(1).to(x.device)

    def decode(self, codes: Tensor, start: int = 0) -> Tensor:
        """Values (m, n), float32, rounded from float64."""
        geometry = self.quantizer.geometry
        size = (self.quantizer.patches(self.shape), geometry.embedding)
        self._check_whole(tuple(codes.shape) == size, start)
        if "codes" in self._last and torch.equal(self._last["codes"], codes):
            return self._last["values"]
        grid = codes.view(-1, geometry.channels, geometry.grid, geometry.grid).double()
        patches = self.decoder.decode(embedding_values(grid, self.quantizer.embed_bits))
        values = unpatched(patches, self.shape).float().contiguous()
        self._last.update(codes=codes.clone(), values=values)
        return values

    def take_rows(self, rows: slice) -> FittedNeural:
        """All rows only: patches are decoded whole. Raises ShapeError otherwise."""
        start, stop, step = rows.indices(self.shape[0])
        self._check_whole((start, stop, step) == (0, self.shape[0], 1), 0)
        return self

    def pack(self, codes: Tensor) -> Tensor:
        """`embed_bits` bits per value, patch by patch."""
        return pack_bits(codes, self.quantizer.embed_bits)

    def unpack(self, packed: Tensor) -> Tensor:
        rows, values = self.quantizer.patches(self.shape), self.quantizer.geometry.embedding
        return unpack_bits(packed, self.quantizer.embed_bits, rows * values).view(rows, values)

    def tensors(self) -> dict[str, Tensor]:
        """The decoder, unless another layer stores it."""
        return {} if self.quantizer.home else self.decoder.tensors()

    def _check_whole(self, whole: bool, start: int) -> None:
        if not whole or start:
            raise ShapeError(f"neural codes stand for all of {self.shape} at once, no part of it")


def neural_part(quantizer: Quantizer) -> tuple[str, Neural | None]:
    """The neural record at the core of a quantizer, and the prefix of its tensors' names."""
    prefix = ""
    while not isinstance(quantizer, Neural | TrainedNeural):
        inner = getattr(quantizer, "inner", None)
        if inner is None:
            return prefix, None
        prefix, quantizer = prefix + INNER, inner
    return prefix, quantizer.record if isinstance(quantizer, TrainedNeural) else quantizer


def with_core(quantizer: Quantizer, core: Neural | TrainedNeural) -> Quantizer:
    """The same quantizer around another neural core."""
    if isinstance(quantizer, Neural | TrainedNeural):
        return core
    return replace(quantizer, inner=with_core(quantizer.inner, core))  # type: ignore[attr-defined, type-var]


def fitted_core(fitted: FittedQuantizer) -> FittedNeural | None:
    """The fitted neural codes at the core of a fitted quantizer."""
    core: object = fitted
    while core is not None and not isinstance(core, FittedNeural):
        core = getattr(core, "inner", None)
    return core


def _checked(W: Tensor, importance: Tensor | None, gain: float) -> Tensor | None:
    """Importance over its mean, or None; checks all arguments of `fit`."""
    check_matrix(W, importance, gain)
    if gain != 1.0:
        raise RecipeError(f"neural codes have no scale to multiply by {gain:g}; use double_scale")
    largest = float(W.abs().max())
    if largest > LARGEST:
        raise NumericalError(
            f"neural codes stand for values within [-1, 1], got {largest:.3g}; "
            "put them in double_scale"
        )
    return None if importance is None else floored(importance).cpu()


def check_borrowed(found: Mapping[str, Tensor], wanted: Layout, home: str) -> None:
    """FormatError unless a home's decoder has the shapes that a borrower needs."""
    for name, (dtype, size) in wanted.items():
        tensor = found.get(name)
        if tensor is None or tensor.dtype != dtype or tuple(tensor.shape) != size:
            raise FormatError(f"the decoder stored with {home} is of another shape: {name}")
