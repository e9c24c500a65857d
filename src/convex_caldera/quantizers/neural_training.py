"""Training an autoencoder of weight patches: ConvNeXt encoder, quantized pixel-shuffle decoder.

    min over encoder and decoder of   sum w (V - D(q(E(V))))^2

with the decoder's weights rounded to their levels and embeddings to theirs in every forward pass,
gradients passing straight through (quantization-aware training). The encoder only serves to find
embeddings and is not stored; the decoder is overfitted to the patches, which is the point.

Source: HNeRV, arXiv 2304.02633; ReALLM, arXiv 2405.13155. Learning rate as theirs: 10 % linear
warm-up from a tenth, then a cosine to zero; the best of ten looks at the whole set is kept.
Differs: errors are weighted by the importance of their column; embeddings are
clipped and quantized in training, theirs afterwards or not at all; training starts from a linear
transform code (`neural_start`) instead of noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from convex_caldera.core.seeds import generator
from convex_caldera.errors import NumericalError
from convex_caldera.quantizers.neural_decoder import (
    Decoder,
    DecoderShape,
    evaluate,
    nearest_levels,
    quantize_parameters,
)
from convex_caldera.quantizers.neural_start import cosine_basis, linear_decoder, uniform
from convex_caldera.quantizers.normal_float import levels

Parameters = list[tuple[Tensor, Tensor]]
Progress = Callable[[int, int, float], None]  # epochs done, of so many, relative error

WARM_UP = 0.1  # share of the steps (ReALLM's code)
WARM_UP_FROM = 0.1  # of the learning rate
LAYER_SCALE = 1e-6  # ConvNeXt's initial weight of a residual branch
BLOCK_KERNEL = 7
EXPANSION = 4
STEPS_AN_EPOCH = 8  # at least, where there are so many patches
BATCH_VALUES = 1 << 18  # at most, but one patch
LOOKS = 10  # at the error over all patches
REFINEMENT_RATE = 0.02
# Standard deviations that an embedding of size 1 stands for at the start, by embedding bits: half
# the range of the best uniform code of a Gaussian (Max, 1960).
LOADING = (1.596, 1.992, 2.344, 2.682, 3.010, 3.331, 3.645, 3.954)


@dataclass(frozen=True, eq=False)
class Patches:
    """Values (N, 1, p, p), and the weight of each of their columns (N, 1, 1, p) and rows.

    What lies outside of the matrix has weight 0.
    """

    values: Tensor
    columns: Tensor
    rows: Tensor

    def __len__(self) -> int:
        return self.values.shape[0]

    def take(self, index: Tensor) -> Patches:
        return Patches(self.values[index], self.columns[index], self.rows[index])

    @property
    def energy(self) -> Tensor:
        """(N,) weighted squares of each patch."""
        return self.errors(torch.zeros_like(self.values))

    def errors(self, values: Tensor) -> Tensor:
        """(N,) weighted squared distance of each patch."""
        gaps = (values - self.values).square() * self.columns * self.rows
        return gaps.sum((1, 2, 3))


def patches_of(V: Tensor, patch: int, importance: Tensor | None = None) -> Patches:
    """A matrix (m, n) cut into patches, row by row of patches, zeros at the lower and right rim."""
    m, n = V.shape
    down, across = -(-m // patch), -(-n // patch)
    padded = F.pad(V.float(), (0, across * patch - n, 0, down * patch - m))
    values = padded.view(down, patch, across, patch).transpose(1, 2).reshape(-1, 1, patch, patch)
    weights = torch.ones(n, device=V.device) if importance is None else importance.float()
    columns = F.pad(weights, (0, across * patch - n)).view(1, across, 1, 1, patch)
    rows = F.pad(torch.ones(m, device=V.device), (0, down * patch - m)).view(down, 1, 1, patch, 1)
    return Patches(
        values,
        columns.expand(down, -1, -1, -1, -1).reshape(-1, 1, 1, patch),
        rows.expand(-1, across, -1, -1, -1).reshape(-1, 1, patch, 1),
    )


def joined(patches: list[Patches]) -> Patches:
    """The patches of several matrices, each weighted so that all have one energy."""
    scaled = []
    for part in patches:
        energy = float(part.energy.sum())
        factor = part.rows.sum() * part.values.shape[-1] / energy if energy > 0 else 1.0
        scaled.append(Patches(part.values, part.columns * factor, part.rows))
    return Patches(
        torch.cat([part.values for part in scaled]),
        torch.cat([part.columns for part in scaled]),
        torch.cat([part.rows for part in scaled]),
    )


def unpatched(values: Tensor, shape: tuple[int, int]) -> Tensor:
    """Inverse of `patches_of`: (N, p, p) -> (m, n)."""
    (m, n), patch = shape, values.shape[-1]
    down, across = -(-m // patch), -(-n // patch)
    grid = values.view(down, across, patch, patch).transpose(1, 2)
    return grid.reshape(down * patch, across * patch)[:m, :n]


# --- the encoder ----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Encoder:
    """ConvNeXt beside a linear analysis; `stages` are its tensors in the order of `_stage`.

    The last list holds the analysis (channels, 1, stride, stride) and the weight of the ConvNeXt
    branch (channels,), which starts at 0: layer norms forget the length of what they norm, and
    weights are mostly noise, of which the length is what there is to know.
    """

    strides: tuple[int, ...]
    stages: list[list[Tensor]]

    def __call__(self, x: Tensor) -> Tensor:
        """Embeddings in [-1, 1] before they are quantized, (N, channels, grid, grid)."""
        (analysis, weight), y = self.stages[-1], x
        for i, (stride, tensors) in enumerate(zip(self.strides, self.stages[:-1], strict=True)):
            y = _stage(y, stride, tensors, first=i == 0)
        linear = F.conv2d(x, analysis, stride=math.prod(self.strides))
        return (linear + weight.view(-1, 1, 1) * y).clamp(-1, 1)


def make_encoder(
    shape: DecoderShape, width: int, basis: Tensor, random: torch.Generator
) -> Encoder:
    """Stages of `width` channels, the last of the embedding's; analysis by `basis`."""
    inputs, stages = 1, []
    for i, stride in enumerate(shape.enc_strides):
        outputs = shape.channels if i == len(shape.enc_strides) - 1 else width
        normed = outputs if i == 0 else inputs
        stages.append(
            [
                uniform((outputs, inputs, stride, stride), inputs * stride**2, random),
                torch.zeros(outputs),
                torch.ones(normed),
                torch.zeros(normed),
                uniform((outputs, 1, BLOCK_KERNEL, BLOCK_KERNEL), BLOCK_KERNEL**2, random),
                torch.zeros(outputs),
                torch.ones(outputs),
                torch.zeros(outputs),
                uniform((EXPANSION * outputs, outputs, 1, 1), outputs, random),
                torch.zeros(EXPANSION * outputs),
                uniform((outputs, EXPANSION * outputs, 1, 1), EXPANSION * outputs, random),
                torch.zeros(outputs),
                torch.full((outputs,), LAYER_SCALE),
            ]
        )
        inputs = outputs
    stages.append([basis.view(-1, 1, shape.stride, shape.stride).clone(), torch.zeros(inputs)])
    return Encoder(shape.enc_strides, stages)


def _stage(x: Tensor, stride: int, tensors: list[Tensor], first: bool) -> Tensor:
    """Strided convolution with a layer norm after (first) or before it, then one block."""
    down, bias, gain, shift, deep, deep_bias, gain2, shift2, up, up_bias, back, back_bias, scale = (
        tensors
    )
    if not first:
        x = _norm(x, gain, shift)
    x = F.conv2d(x, down, bias, stride=stride)
    if first:
        x = _norm(x, gain, shift)
    y = F.conv2d(x, deep, deep_bias, padding=BLOCK_KERNEL // 2, groups=x.shape[1])
    y = F.conv2d(F.gelu(F.conv2d(_norm(y, gain2, shift2), up, up_bias)), back, back_bias)
    return x + scale.view(-1, 1, 1) * y


def _norm(x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    """Layer norm over channels."""
    if x.shape[1] == 1:  # over one channel it would leave nothing
        return x * gain.view(-1, 1, 1) + shift.view(-1, 1, 1)
    variance, mean = torch.var_mean(x, dim=1, keepdim=True, unbiased=False)
    unit = (x - mean) * torch.rsqrt(variance + 1e-6)
    return unit * gain.view(-1, 1, 1) + shift.view(-1, 1, 1)


# --- quantization ---------------------------------------------------------------------------


def embedding_codes(embeddings: Tensor, bits: int) -> Tensor:
    """Codes 0 .. 2^bits - 1 of values in [-1, 1], cells of equal width."""
    cells = 1 << bits
    return ((embeddings + 1) * (cells / 2)).floor().clamp(0, cells - 1)


def embedding_values(codes: Tensor, bits: int) -> Tensor:
    """Centres of the cells, (2 c + 1) / 2^bits - 1, exact in float32."""
    return (2 * codes + 1) / (1 << bits) - 1


def straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """`rounded` with the gradient of x."""
    return x + (rounded - x).detach()


def rounded_parameters(parameters: Parameters, bits: int) -> Parameters:
    """Weights at their levels, as `quantize_parameters` will store them, differentiable."""
    table = levels(bits)
    found = []
    for weight, bias in parameters:
        flat = weight.detach().flatten(1)
        scale = flat.abs().amax(1, keepdim=True).half().float()
        values = (table[nearest_levels(flat, scale, bits)] * scale).view_as(weight)
        found.append((straight_through(weight, values), bias))
    return found


# --- training -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """How an autoencoder is trained; only the decoder's shape and bits show in what is stored."""

    decoder_bits: int
    embed_bits: int
    encoder_width: int
    epochs: int
    rate: float
    seed: int
    refinements: int


def train(
    patches: Patches, shape: DecoderShape, options: Training, progress: Progress | None = None
) -> tuple[Decoder, Encoder]:
    """The best decoder found, quantized as stored, and the encoder that belongs to it.

    Args:
        patches: on the CPU, values within about [-1, 1].
        progress: told of every epoch.

    Raises:
        NumericalError: the error is not finite any more; a lower rate is the remedy.

    Cost: epochs * values * about 6 multiply-adds per decoder and encoder weight and pixel. One
    thread is used, so that the result does not depend on how many there are.
    """
    random = generator(options.seed, f"{shape}", "neural training")
    size = LOADING[options.embed_bits - 1] * (float(patches.values.square().mean().sqrt()) or 1.0)
    basis = cosine_basis(shape.channels, shape.stride)
    encoder = make_encoder(shape, options.encoder_width, basis / size, random)
    parameters = linear_decoder(shape, size * basis, random)
    leaves = [t for stage in encoder.stages for t in stage] + [
        t for pair in parameters for t in pair
    ]
    for tensor in leaves:
        tensor.requires_grad_()
    with one_thread():
        best = _descend(patches, shape, options, encoder, parameters, leaves, random, progress)
    kept = iter(best)
    stages = [[next(kept) for _ in stage] for stage in encoder.stages]
    trained = [(next(kept), next(kept)) for _ in parameters]
    decoder = quantize_parameters(shape, trained, options.decoder_bits)
    return decoder, Encoder(encoder.strides, stages)


def _descend(
    patches: Patches,
    shape: DecoderShape,
    options: Training,
    encoder: Encoder,
    parameters: Parameters,
    leaves: list[Tensor],
    random: torch.Generator,
    progress: Progress | None,
) -> list[Tensor]:
    """Adam; the leaves at the best look."""
    batch = _batch_size(len(patches), shape.patch)
    count = -(-len(patches) // batch)
    optimizer = torch.optim.Adam(leaves, lr=options.rate)
    scale = float(patches.energy.sum()) or 1.0
    best: tuple[float, list[Tensor]] | None = None
    for epoch in range(options.epochs):
        order = torch.randperm(len(patches), generator=random)
        for i, index in enumerate(order.split(batch)):
            optimizer.param_groups[0]["lr"] = options.rate * _schedule(
                (epoch * count + i) / (options.epochs * count)
            )
            part = patches.take(index)
            optimizer.zero_grad()
            loss = _loss(part, shape, options, encoder, parameters).sum() * (count / scale)
            loss.backward()
            optimizer.step()
        if epoch == options.epochs - 1 or (epoch + 1) % max(options.epochs // LOOKS, 1) == 0:
            error = _whole_loss(patches, shape, options, encoder, parameters, batch) / scale
            if not math.isfinite(error):
                raise NumericalError(
                    f"training diverged in epoch {epoch + 1}; lower the learning rate "
                    f"{options.rate:g}"
                )
            if best is None or error < best[0]:
                best = (error, [leaf.detach().clone() for leaf in leaves])
        if progress is not None:
            progress(epoch + 1, options.epochs, float(loss.detach()))
    assert best is not None  # there is at least one epoch
    return best[1]


def _loss(
    part: Patches, shape: DecoderShape, options: Training, encoder: Encoder, parameters: Parameters
) -> Tensor:
    """(N,) weighted errors of what decoding would give."""
    e = encoder(part.values)
    e = straight_through(
        e, embedding_values(embedding_codes(e, options.embed_bits), options.embed_bits)
    )
    values = evaluate(shape, rounded_parameters(parameters, options.decoder_bits), e)
    return part.errors(values)


@torch.no_grad()
def _whole_loss(
    patches: Patches,
    shape: DecoderShape,
    options: Training,
    encoder: Encoder,
    parameters: Parameters,
    batch: int,
) -> float:
    indices = torch.arange(len(patches)).split(batch)
    return sum(
        float(_loss(patches.take(i), shape, options, encoder, parameters).double().sum())
        for i in indices
    )


def _batch_size(count: int, patch: int) -> int:
    most = max(BATCH_VALUES // patch**2, 1)
    return max(min(-(-count // STEPS_AN_EPOCH), most), 1)


def _schedule(share: float) -> float:
    """Share of the learning rate after that share of the steps."""
    if share < WARM_UP:
        return WARM_UP_FROM + (1 - WARM_UP_FROM) * share / WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (share - WARM_UP) / (1 - WARM_UP)))


def embed(patches: Patches, decoder: Decoder, encoder: Encoder | None, options: Training) -> Tensor:
    """Codes (N, channels, grid, grid) of embeddings, refined for a decoder that is fixed.

    Adam on each patch's own embedding, starting from the encoder's (from 0 without one), the
    best codes of every patch kept. Deterministic.
    """
    shape = decoder.shape
    parameters = decoder.parameters(torch.float32, patches.values.device)
    batch = _batch_size(len(patches), shape.patch)
    found = []
    with one_thread():
        for index in torch.arange(len(patches)).split(batch):
            found.append(_embed_batch(patches.take(index), shape, parameters, encoder, options))
    return torch.cat(found)


def _embed_batch(
    part: Patches,
    shape: DecoderShape,
    parameters: Parameters,
    encoder: Encoder | None,
    options: Training,
) -> Tensor:
    bits = options.embed_bits
    size = (len(part), shape.channels, shape.grid, shape.grid)
    with torch.no_grad():
        start = torch.zeros(size) if encoder is None else encoder(part.values)
    e = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([e], lr=REFINEMENT_RATE)
    best, least = embedding_codes(start, bits), torch.full((len(part),), torch.inf)
    scale = float(part.energy.sum()) or 1.0
    for _ in range(options.refinements + 1):
        optimizer.zero_grad()
        codes = embedding_codes(e.detach(), bits)
        values = evaluate(shape, parameters, straight_through(e, embedding_values(codes, bits)))
        errors = part.errors(values)
        (errors.sum() / scale).backward()
        better = errors.detach() < least
        best[better], least[better] = codes[better], errors.detach()[better]
        optimizer.step()
        with torch.no_grad():
            e.clamp_(-1, 1)
    return best.to(torch.uint8)


@contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread inside: sums in one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
