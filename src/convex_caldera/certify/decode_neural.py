"""Neural codes: embeddings of patches, unfolded by a small pixel-shuffle decoder in float64.

    E (C, g, g) -> GELU(PS_h(conv_1 E)) -> GELU(PS_s(conv_k .)) for every stride s -> conv_3 .

Weights are NormalFloat levels times a float16 scale of the output channel, biases float16,
embedding values (2 c + 1) / 2^b - 1, GELU(x) = x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2,
and convolutions see zeros around a patch. Values are float64 until they are rounded to float32 at
the end. Another decoder sums in another order, so both agree to one unit in the last place of
float32 and not always to the bit: TOLERANCE. A layer with a `home` has no decoder of its own; its
caller adds the one stored there.

Source: Chen et al., HNeRV, arXiv 2304.02633; Leconte et al., ReALLM, arXiv 2405.13155.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convex_caldera.certify.codec import (
    Array,
    Layout,
    Option,
    QuantizerFormat,
    Record,
    Shape,
    finite,
    integer,
    real,
)
from convex_caldera.certify.decode_bits import packed_size, unpack
from convex_caldera.certify.decode_normal_float import levels
from convex_caldera.errors import FormatError

Floats = NDArray[np.float64]
Convolution = tuple[int, int, int, int]  # inputs, outputs, kernel, shuffle
DECODER = ("decoder_codes", "decoder_scales", "decoder_biases")
# Relative difference from another float64 decoder, after both are rounded to float32.
TOLERANCE = 2.0**-23
REDUCTION, HEAD_KERNEL = 1.2, 3
MOST_STRIDES, MOST_SIDE, MOST_CHANNELS = 16, 1 << 13, 1 << 14
MOST_FEATURES = 1 << 26  # values of a patch's largest layer
_CHUNK_FEATURES = 1 << 23


def neural_core(record: Record) -> tuple[str, Record | None]:
    """The neural record within a record, and the prefix of its parts' names."""
    prefix, core = "", record
    while core["kind"] != "neural":
        if "inner" not in core:
            return prefix, None
        prefix, core = prefix + "inner_", core["inner"]
    return prefix, core


def layers_of(record: Record) -> list[Convolution]:
    """The decoder's convolutions. Raises FormatError where strides do not fit together."""
    down, up = math.prod(record["enc_strides"]), math.prod(record["dec_strides"])
    first, last = record["kernels"]
    if record["patch"] % down or down % up or not first % 2 or not last % 2 or last < first:
        raise FormatError("neural: patch, strides or kernels do not fit together")
    width, ratio = record["width"], down // up
    found = [(record["channels"], width * ratio**2, 1, ratio)]
    for i, stride in enumerate(record["dec_strides"]):
        narrower = max(round(width / REDUCTION), record["least_width"])
        found.append((width, narrower * stride**2, min(first + 2 * i, last), stride))
        width = narrower
    found.append((width, 1, HEAD_KERNEL, 1))
    if features(record, found) > MOST_FEATURES:
        raise FormatError(f"neural: a patch has more than {MOST_FEATURES} features in a layer")
    return found


def features(record: Record, layers: list[Convolution]) -> int:
    """Values of a patch's largest layer."""
    side, most = embedding_shape(record)[1], 0
    for _, outputs, _, shuffle in layers:
        most = max(most, side * side * outputs)
        side *= shuffle
    return most


def embedding_shape(record: Record) -> tuple[int, int, int]:
    grid = record["patch"] // math.prod(record["enc_strides"])
    return record["channels"], grid, grid


def patches(record: Record, shape: Shape) -> tuple[int, int]:
    """Rows and columns of patches that cover a matrix."""
    return -(-shape[0] // record["patch"]), -(-shape[1] // record["patch"])


def decoder_layout(record: Record) -> Layout:
    """What the decoder takes wherever it is stored."""
    layers = layers_of(record)
    weights = sum(inputs * outputs * kernel**2 for inputs, outputs, kernel, _ in layers)
    channels = sum(outputs for _, outputs, _, _ in layers)
    return {
        "decoder_codes": ("U8", (packed_size(weights, record["decoder_bits"]),)),
        "decoder_scales": ("F16", (channels,)),
        "decoder_biases": ("F16", (channels,)),
    }


def layout(record: Record, shape: Shape) -> Layout:
    decoder = decoder_layout(record)
    down, across = patches(record, shape)
    count = down * across * math.prod(embedding_shape(record))
    own = {} if record["home"] else decoder
    return {"codes": ("U8", (packed_size(count, record["embed_bits"]),)), **own}


def decode(record: Record, shape: Shape, tensors: Mapping[str, Array]) -> NDArray[np.float32]:
    for name, (_, size) in decoder_layout(record).items():
        if name not in tensors or tensors[name].shape != size:
            raise FormatError(f"neural: {name} is missing or not of {size}")
    parameters = _parameters(record, tensors)
    (m, n), (down, across), p = shape, patches(record, shape), record["patch"]
    size = embedding_shape(record)
    codes = unpack(tensors["codes"], record["embed_bits"], down * across * math.prod(size))
    codes = codes.reshape(down * across, *size)
    values = np.empty((down * across, p, p), np.float32)
    layers = layers_of(record)
    step = max(1, _CHUNK_FEATURES // features(record, layers))
    for start in range(0, len(values), step):
        part = codes[start : start + step].astype(np.float64)
        embeddings = (2 * part + 1) / (1 << record["embed_bits"]) - 1
        values[start : start + step] = _unfold(parameters, layers, embeddings)
    whole = values.reshape(down, across, p, p).transpose(0, 2, 1, 3).reshape(down * p, across * p)
    return np.ascontiguousarray(whole[:m, :n])


def _parameters(record: Record, tensors: Mapping[str, Array]) -> list[tuple[Floats, Floats]]:
    """(weight (outputs, inputs, k, k), bias) of every layer."""
    scales = finite(tensors["decoder_scales"], "decoder_scales").astype(np.float64)
    biases = finite(tensors["decoder_biases"], "decoder_biases").astype(np.float64)
    if (scales < 0).any():
        raise FormatError("decoder_scales must not be negative")
    layers = layers_of(record)
    bits = record["decoder_bits"]
    count = sum(inputs * outputs * kernel**2 for inputs, outputs, kernel, _ in layers)
    values = levels(bits).astype(np.float64)[unpack(tensors["decoder_codes"], bits, count)]
    found, at, channel = [], 0, 0
    for inputs, outputs, kernel, _ in layers:
        size = inputs * outputs * kernel**2
        rows = slice(channel, channel + outputs)
        weight = values[at : at + size].reshape(outputs, inputs, kernel, kernel)
        found.append((weight * scales[rows, None, None, None], biases[rows]))
        at, channel = at + size, channel + outputs
    return found


def _unfold(
    parameters: list[tuple[Floats, Floats]], layers: list[Convolution], x: Floats
) -> NDArray[np.float32]:
    """Patches (N, p, p) of embeddings (N, C, g, g)."""
    last = len(layers) - 1
    for i, ((weight, bias), (_, _, _, shuffle)) in enumerate(zip(parameters, layers, strict=True)):
        x = pixel_shuffle(convolve(x, weight, bias), shuffle)
        if i < last:
            x = gelu(x)
    if not np.isfinite(x).all() or np.abs(x).max(initial=0.0) > np.finfo(np.float32).max:
        raise FormatError("neural: decodes to NaN or infinite values")
    return x[:, 0].astype(np.float32)


def convolve(x: Floats, weight: Floats, bias: Floats) -> Floats:
    """(N, C, h, w) -> (N, outputs, h, w): one product per tap, zeros around the border."""
    n, _, h, w = x.shape
    outputs, _, kernel, _ = weight.shape
    rim = kernel // 2
    padded = np.pad(x, ((0, 0), (0, 0), (rim, rim), (rim, rim)))
    total = np.broadcast_to(bias[:, None], (n, outputs, h * w)).copy()
    for i in range(kernel):
        for j in range(kernel):
            seen = padded[:, :, i : i + h, j : j + w].reshape(n, -1, h * w)
            total += weight[:, :, i, j] @ seen
    return total.reshape(n, outputs, h, w)


def pixel_shuffle(x: Floats, factor: int) -> Floats:
    """Channel c s^2 + i s + j becomes pixel (i, j) of every s x s cell of channel c."""
    if factor == 1:
        return x
    n, channels, h, w = x.shape
    cells = x.reshape(n, channels // factor**2, factor, factor, h, w)
    return cells.transpose(0, 1, 4, 2, 5, 3).reshape(n, -1, h * factor, w * factor)


def gelu(x: Floats) -> Floats:
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * (x * x * x))
    return np.asarray(0.5 * x * (1 + np.tanh(inner)))


def _integers(low: int, high: int, lengths: range) -> Option:
    fits = integer(low, high)

    def check(value: Any) -> bool:
        return isinstance(value, list) and len(value) in lengths and all(map(fits, value))

    return check


FORMAT = QuantizerFormat(
    {
        "patch": integer(1, MOST_SIDE),
        "channels": integer(1, MOST_CHANNELS),
        "enc_strides": _integers(1, MOST_SIDE, range(1, MOST_STRIDES)),
        "dec_strides": _integers(1, MOST_SIDE, range(1, MOST_STRIDES)),
        "width": integer(1, MOST_CHANNELS),
        "kernels": _integers(1, 99, range(2, 3)),
        "least_width": integer(1, MOST_CHANNELS),
        "decoder_bits": integer(2, 8),
        "embed_bits": integer(1, 8),
        "home": lambda value: isinstance(value, str),
        "encoder_width": integer(1),
        "epochs": integer(1),
        "rate": real(0.0, math.inf),
        "seed": integer(-math.inf),  # type: ignore[arg-type]
        "refinements": integer(0),
    },
    layout,
    decode,
)
