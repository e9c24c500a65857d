"""Where training starts: an autoencoder that already is a linear transform code.

    encoder   E = B x                B the `channels` lowest cosines over a place's pixels
    decoder   GELU(u) - GELU(-u) = u   carries every signal through as a pair of channels

so that the decoder computes B^T E exactly, whatever its depth, wherever its widths leave room
for the pairs; all other weights are small and random. From noise, a network of this size needs
hours to find what is written down here at once.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from convex_caldera.quantizers.neural_decoder import HEAD_KERNEL, Convolution, DecoderShape

Parameters = list[tuple[Tensor, Tensor]]
NOISE = 0.02  # of the usual random start, beside the exact weights


def cosine_basis(channels: int, side: int) -> Tensor:
    """(channels, side^2) orthonormal rows: products of cosines, low frequencies first.

    Beyond side^2 channels rows repeat, so that more channels than pixels are no error.
    """
    k, x = torch.arange(side).double(), torch.arange(side).double() + 0.5
    rows = torch.cos(math.pi / side * k[:, None] * x) * math.sqrt(2 / side)
    rows[0] /= math.sqrt(2)
    pairs = sorted(((i, j) for i in range(side) for j in range(side)), key=lambda p: (sum(p), p))
    chosen = [pairs[c % len(pairs)] for c in range(channels)]
    return torch.stack([torch.outer(rows[i], rows[j]).flatten() for i, j in chosen]).float()


def uniform(size: tuple[int, ...], fan_in: int, random: torch.Generator) -> Tensor:
    """Uniform of variance 1 / fan_in."""
    return (2 * torch.rand(size, generator=random) - 1) * math.sqrt(3 / fan_in)


def linear_decoder(shape: DecoderShape, basis: Tensor, random: torch.Generator) -> Parameters:
    """Weights and biases of a decoder that computes sum_c E_c basis_c on every place's pixels.

    Args:
        basis: (channels, stride^2), pixels row-major.

    Where a stage is too narrow for the pairs the weights of all layers are random.
    """
    random_weights = [
        uniform(
            (layer.outputs, layer.inputs, layer.kernel, layer.kernel),
            layer.inputs * layer.kernel**2,
            random,
        )
        for layer in shape.layers
    ]
    exact = _exact_weights(shape, basis)
    if exact is None:
        return [(weight, torch.zeros(weight.shape[0])) for weight in random_weights]
    parameters = []
    for weight, noise, layer in zip(exact, random_weights, shape.layers, strict=True):
        full = NOISE * noise * weight.abs().amax()
        # Rows that carry a signal are exact; noise there would be noise in every value.
        carrying = weight.abs().amax(1) > 0
        full[carrying] = 0
        full[carrying, :, layer.kernel // 2, layer.kernel // 2] = weight[carrying]
        parameters.append((full, torch.zeros(layer.outputs)))
    return parameters


def _exact_weights(shape: DecoderShape, basis: Tensor) -> list[Tensor] | None:
    """(outputs, inputs) of the central tap of every layer; None where widths leave no room."""
    side, layers = shape.stride, shape.layers
    carried = None  # signals per place: None means the embedding's channels, else a block's side
    found = []
    for i, layer in enumerate(layers):
        last = i == len(layers) - 1
        width = layer.outputs // layer.shuffle**2
        side //= layer.shuffle
        if carried is None and i == 0 and layer.shuffle == 1:
            if 2 * shape.channels > width:
                return None
            found.append(_pairs(torch.eye(shape.channels), layer))
            continue
        if last:
            found.append(_joining(layer) if carried == 1 else None)
            break
        if 2 * side * side > width:
            return None
        whole = side * layer.shuffle
        source = basis.T if carried is None else torch.eye(whole * whole)
        matrix = _placed(source, whole, layer.shuffle)
        if i > 0:
            matrix = torch.cat([matrix, -matrix], dim=2).view(*matrix.shape[:2], 2, -1)
            matrix = matrix.transpose(2, 3).flatten(2)
        found.append(_spread(matrix, width, layer))
        carried = side
    return None if any(weight is None for weight in found) else found  # type: ignore[return-value]


def _placed(source: Tensor, whole: int, shuffle: int) -> Tensor:
    """Rows of `source` (pixels of a block, signals) by place in the shuffle: (places, pixels, .)"""
    part = whole // shuffle
    grid = source.view(shuffle, part, shuffle, part, -1)
    return grid.permute(0, 2, 1, 3, 4).reshape(shuffle**2, part**2, -1)


def _pairs(matrix: Tensor, layer: Convolution) -> Tensor:
    """Outputs 2 c and 2 c + 1 are +- the row c of `matrix` (signals, inputs)."""
    weight = torch.zeros(layer.outputs, layer.inputs)
    weight[0 : 2 * len(matrix) : 2, : matrix.shape[1]] = matrix
    weight[1 : 2 * len(matrix) : 2, : matrix.shape[1]] = -matrix
    return weight


def _spread(matrix: Tensor, width: int, layer: Convolution) -> Tensor:
    """Pairs of channels after the shuffle: channel c at place q is output c * places + q."""
    places, pixels, inputs = matrix.shape
    weight = torch.zeros(width, places, layer.inputs)
    for p in range(pixels):
        weight[2 * p, :, :inputs] = matrix[:, p]
        weight[2 * p + 1, :, :inputs] = -matrix[:, p]
    return weight.view(layer.outputs, layer.inputs)


def _joining(layer: Convolution) -> Tensor:
    """The head: the one pair's difference."""
    assert layer.kernel == HEAD_KERNEL
    weight = torch.zeros(1, layer.inputs)
    weight[0, 0], weight[0, 1] = 1.0, -1.0
    return weight
