"""The pixel-shuffle decoder of HNeRV with its weights on a few bits, and its exact evaluation.

    E (channels, g, g)  -> GELU(PS_h(conv_1 E))  -> GELU(PS_s(conv_k .))  for every stride s
                        -> conv_3 .              = a patch of `patch` x `patch` values

PS_s is the pixel shuffle by s, h = prod(enc_strides) / prod(dec_strides). Widths fall by 1.2 a
stage down to the least, kernels grow by 2 from the first to the last. Every weight is a
NormalFloat level times a float16 scale of its output channel, biases are float16. Stored
parameters are turned into values in float64 throughout, so that another decoder agrees to the
last bit of float32 but for ties; GELU is its tanh form,
0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))).

Source: Chen et al., HNeRV, arXiv 2304.02633, and ReALLM's use of it, arXiv 2405.13155. Differs:
all weights are quantized (theirs leave stem and head in float32), scales are float16 per output
channel (theirs float32 per run of inputs), and the head is linear (theirs ends in tanh).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from convex_caldera.coding.bitpack import pack_bits, packed_bytes, unpack_bits
from convex_caldera.errors import FormatError, RecipeError
from convex_caldera.quantizers.normal_float import levels

REDUCTION = 1.2  # by which a stage is narrower than the one before it (HNeRV)
HEAD_KERNEL = 3
MOST_FEATURES = 1 << 26  # values of a patch's largest layer, so that any reader has the memory
_CHUNK_FEATURES = 1 << 23  # decoded at a time


@dataclass(frozen=True)
class Convolution:
    """One layer: inputs, outputs before the shuffle, kernel, and the shuffle's factor."""

    inputs: int
    outputs: int
    kernel: int
    shuffle: int

    @property
    def weights(self) -> int:
        return self.inputs * self.outputs * self.kernel * self.kernel


@dataclass(frozen=True)
class DecoderShape:
    """Geometry of a decoder; `width` is HNeRV's fc_dim.

    Raises RecipeError where strides, kernels or sizes do not fit together.
    """

    patch: int
    channels: int
    enc_strides: tuple[int, ...]
    dec_strides: tuple[int, ...]
    width: int
    kernels: tuple[int, int]
    least_width: int

    def __post_init__(self) -> None:
        strides = (*self.enc_strides, *self.dec_strides)
        if not self.enc_strides or not self.dec_strides or min(strides) < 1:
            raise RecipeError(f"strides are positive, got {self.enc_strides}, {self.dec_strides}")
        down, up = math.prod(self.enc_strides), math.prod(self.dec_strides)
        if self.patch < 1 or self.patch % down:
            raise RecipeError(f"patch {self.patch} is no multiple of the strides' product {down}")
        if down % up:
            raise RecipeError(
                f"decoder strides multiply to {up}, which does not divide the encoder's {down}"
            )
        first, last = self.kernels
        if min(first, last) < 1 or not first % 2 or not last % 2 or last < first:
            raise RecipeError(f"kernels are odd and do not shrink, got {first} .. {last}")
        if min(self.channels, self.width, self.least_width) < 1:
            raise RecipeError(
                f"channels, width and least_width are positive, got {self.channels}, "
                f"{self.width}, {self.least_width}"
            )

        if self.features > MOST_FEATURES:
            raise RecipeError(
                f"a patch has {self.features} features in its largest layer, more than "
                f"{MOST_FEATURES}; choose smaller patches or less width"
            )

    @property
    def features(self) -> int:
        """Values of a patch's largest layer."""
        side, most = self.grid, 0
        for layer in self.layers:
            most = max(most, side * side * layer.outputs)
            side *= layer.shuffle
        return most

    @property
    def stride(self) -> int:
        """Rows and columns of a patch that one place of its embedding stands for."""
        return math.prod(self.enc_strides)

    @property
    def grid(self) -> int:
        """Side of an embedding."""
        return self.patch // self.stride

    @property
    def embedding(self) -> int:
        """Values that stand for a patch."""
        return self.channels * self.grid * self.grid

    @property
    def layers(self) -> tuple[Convolution, ...]:
        """Stem, one per stride, head."""
        ratio = self.stride // math.prod(self.dec_strides)
        found = [Convolution(self.channels, self.width * ratio**2, 1, ratio)]
        width, (first, last) = self.width, self.kernels
        for i, stride in enumerate(self.dec_strides):
            narrower = max(round(width / REDUCTION), self.least_width)
            found.append(Convolution(width, narrower * stride**2, min(first + 2 * i, last), stride))
            width = narrower
        return (*found, Convolution(width, 1, HEAD_KERNEL, 1))

    @property
    def weights(self) -> int:
        return sum(layer.weights for layer in self.layers)

    @property
    def outputs(self) -> int:
        """Output channels of all layers: so many scales, and so many biases."""
        return sum(layer.outputs for layer in self.layers)

    def layout(self, bits: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Stored parts: weight codes as one bit stream, scales and biases by output channel."""
        return {
            "decoder_codes": (torch.uint8, (packed_bytes(self.weights, bits),)),
            "decoder_scales": (torch.float16, (self.outputs,)),
            "decoder_biases": (torch.float16, (self.outputs,)),
        }


@dataclass(frozen=True, eq=False)
class Decoder:
    """A decoder as stored: codes (weights,), scales and biases (outputs,) float16.

    Weights of a layer are (outputs, inputs, kernel, kernel), row-major; layers in order.
    """

    shape: DecoderShape
    bits: int
    codes: Tensor
    scales: Tensor
    biases: Tensor

    def tensors(self) -> dict[str, Tensor]:
        return {
            "decoder_codes": pack_bits(self.codes, self.bits),
            "decoder_scales": self.scales,
            "decoder_biases": self.biases,
        }

    @classmethod
    def restore(cls, shape: DecoderShape, bits: int, tensors: dict[str, Tensor]) -> Decoder:
        """From `tensors()`, whose shapes and dtypes are already checked."""
        if (tensors["decoder_scales"] < 0).any():
            raise FormatError("decoder_scales are not negative: altered file")
        codes = unpack_bits(tensors["decoder_codes"], bits, shape.weights)
        return cls(shape, bits, codes, tensors["decoder_scales"], tensors["decoder_biases"])

    def parameters(
        self, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> list[tuple[Tensor, Tensor]]:
        """(weight, bias) of every layer: level * scale."""
        table = levels(self.bits).to(device, dtype)
        values, found, first, channel = table[self.codes.to(device).long()], [], 0, 0
        for layer in self.shape.layers:
            size = (layer.outputs, layer.inputs, layer.kernel, layer.kernel)
            rows = slice(channel, channel + layer.outputs)
            scale = self.scales[rows].to(device, dtype).view(-1, 1, 1, 1)
            weight = values[first : first + layer.weights].view(size) * scale
            found.append((weight, self.biases[rows].to(device, dtype)))
            first, channel = first + layer.weights, channel + layer.outputs
        return found

    def decode(self, embeddings: Tensor) -> Tensor:
        """Patches (N, patch, patch), float64, of embeddings (N, channels, grid, grid)."""
        parameters = self.parameters(torch.float64, embeddings.device)
        step = max(1, _CHUNK_FEATURES // self.shape.features)
        parts = [evaluate(self.shape, parameters, part) for part in embeddings.double().split(step)]
        return torch.cat(parts)[:, 0]


def evaluate(shape: DecoderShape, parameters: list[tuple[Tensor, Tensor]], x: Tensor) -> Tensor:
    """Patches (N, 1, patch, patch) of embeddings x (N, channels, grid, grid), differentiable."""
    last = len(parameters) - 1
    for i, ((weight, bias), layer) in enumerate(zip(parameters, shape.layers, strict=True)):
        x = F.conv2d(x, weight, bias, padding=layer.kernel // 2)
        if layer.shuffle > 1:
            x = F.pixel_shuffle(x, layer.shuffle)
        if i != last:
            x = F.gelu(x, approximate="tanh")
    return x


def quantize_parameters(
    shape: DecoderShape, parameters: list[tuple[Tensor, Tensor]], bits: int
) -> Decoder:
    """Nearest levels under each output channel's largest weight, as stored."""
    codes, scales, biases = [], [], []
    for weight, bias in parameters:
        flat = weight.detach().float().flatten(1)
        scale = flat.abs().amax(1).half()
        codes.append(nearest_levels(flat, scale.float()[:, None], bits).flatten())
        scales.append(scale)
        biases.append(bias.detach().half())
    return Decoder(
        shape, bits, torch.cat(codes).to(torch.uint8), torch.cat(scales), torch.cat(biases)
    )


def nearest_levels(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Codes of x over `scale` (broadcast); what has scale 0 gets the code of 0."""
    table = levels(bits).to(x.device)
    between = (table[1:] + table[:-1]) / 2
    return torch.bucketize(x / torch.where(scale == 0, torch.inf, scale), between)


def width_for(parameters: int, shape: DecoderShape) -> int:
    """The largest width whose decoder has at most so many weights and biases.

    HNeRV solves a quadratic for it; this searches, so the number is exact.

    Raises:
        RecipeError: even width 1 has more.
    """
    from dataclasses import replace

    def size(width: int) -> int:
        found = replace(shape, width=width)
        return found.weights + found.outputs

    if size(1) > parameters:
        raise RecipeError(
            f"the smallest decoder has {size(1)} parameters, {parameters} are left to it; "
            "raise modelsize or make embeddings smaller"
        )
    low, high = 1, 2
    while size(high) <= parameters:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) <= parameters else (low, middle)
    return low
