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
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from convex_caldera.core.seeds import generator
from convex_caldera.errors import NumericalError
from convex_caldera.linalg.threads import one_thread
from convex_caldera.quantizers.neural_decoder import (
    Decoder,
    DecoderShape,
    evaluate,
    nearest_levels,
    quantize_parameters,
)
from convex_caldera.quantizers.neural_embedding import (
    embedding_codes,
    embedding_values,
    straight_through,
)
from convex_caldera.quantizers.neural_encoder import Encoder, make_encoder
from convex_caldera.quantizers.neural_patches import Patches
from convex_caldera.quantizers.neural_start import Parameters, cosine_basis, linear_decoder
from convex_caldera.quantizers.normal_float import levels

Progress = Callable[[int, int, float], None]  # epochs done, of so many, relative error

WARM_UP = 0.1  # share of the steps (ReALLM's code)
WARM_UP_FROM = 0.1  # of the learning rate
LOOKS = 10  # at the error over all patches
# Standard deviations that an embedding of size 1 stands for at the start, by embedding bits: half
# the range of the best uniform code of a Gaussian (Max, 1960).
LOADING = (1.596, 1.992, 2.344, 2.682, 3.010, 3.331, 3.645, 3.954)


@dataclass(frozen=True)
class Training:
    """How an autoencoder is trained; only the decoder's shape and bits show in what is stored."""

    decoder_bits: int
    embed_bits: int
    encoder_width: int
    epochs: int
    rate: float
    seed: int


@dataclass(frozen=True, eq=False)
class Autoencoder:
    """What is trained: an encoder and a decoder's parameters, before they are rounded."""

    shape: DecoderShape
    options: Training
    encoder: Encoder
    parameters: Parameters

    @property
    def leaves(self) -> list[Tensor]:
        """Every tensor of both."""
        encoding = [tensor for stage in self.encoder.stages for tensor in stage]
        return encoding + [tensor for pair in self.parameters for tensor in pair]

    def errors(self, part: Patches) -> Tensor:
        """(N,) weighted errors of what decoding would give, everything rounded as stored."""
        bits = self.options.embed_bits
        e = self.encoder(part.values)
        e = straight_through(e, embedding_values(embedding_codes(e, bits), bits))
        parameters = rounded_parameters(self.parameters, self.options.decoder_bits)
        return part.errors(evaluate(self.shape, parameters, e))

    @torch.no_grad()
    def whole_error(self, patches: Patches) -> float:
        """Of all patches."""
        return sum(float(self.errors(part).double().sum()) for part in patches.batches())


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
    trainee = Autoencoder(shape, options, encoder, parameters)
    with one_thread():
        kept = iter(_descend(trainee, patches, random, progress))
    stages = [[next(kept) for _ in stage] for stage in encoder.stages]
    trained = [(next(kept), next(kept)) for _ in parameters]
    decoder = quantize_parameters(shape, trained, options.decoder_bits)
    return decoder, Encoder(encoder.strides, stages)


def _descend(
    trainee: Autoencoder, patches: Patches, random: torch.Generator, progress: Progress | None
) -> list[Tensor]:
    """Adam; the leaves at the best look."""
    options, leaves, batch = trainee.options, trainee.leaves, patches.batch_size()
    for leaf in leaves:
        leaf.requires_grad_()
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
            optimizer.zero_grad()
            loss = trainee.errors(patches.take(index)).sum() * (count / scale)
            loss.backward()
            optimizer.step()
        if epoch == options.epochs - 1 or (epoch + 1) % max(options.epochs // LOOKS, 1) == 0:
            error = trainee.whole_error(patches) / scale
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


def _schedule(share: float) -> float:
    """Share of the learning rate after that share of the steps."""
    if share < WARM_UP:
        return WARM_UP_FROM + (1 - WARM_UP_FROM) * share / WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (share - WARM_UP) / (1 - WARM_UP)))


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
