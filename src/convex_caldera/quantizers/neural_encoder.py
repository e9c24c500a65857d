"""The encoder of patches: ConvNeXt stages beside a linear analysis. It is trained, never stored.

Source: Liu et al., ConvNeXt, arXiv 2201.03545; as the encoder of HNeRV, arXiv 2304.02633. Differs:
the linear analysis, with which training starts (`neural_start`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from convex_caldera.quantizers.neural_decoder import DecoderShape
from convex_caldera.quantizers.neural_start import uniform

LAYER_SCALE = 1e-6  # ConvNeXt's initial weight of a residual branch
BLOCK_KERNEL = 7
EXPANSION = 4


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
    centred = x - x.mean(1, keepdim=True)  # torch.var_mean takes twice the time over channels
    unit = centred * torch.rsqrt(centred.square().mean(1, keepdim=True) + 1e-6)
    return unit * gain.view(-1, 1, 1) + shift.view(-1, 1, 1)
