"""Embeddings of patches as codes: uniform cells of [-1, 1], and the codes under a fixed decoder."""

from __future__ import annotations

import torch
from torch import Tensor

from convex_caldera.linalg.threads import one_thread
from convex_caldera.quantizers.neural_decoder import Decoder, DecoderShape, evaluate
from convex_caldera.quantizers.neural_encoder import Encoder
from convex_caldera.quantizers.neural_patches import Patches
from convex_caldera.quantizers.neural_start import Parameters

REFINEMENT_RATE = 0.02


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


def embed(
    patches: Patches, decoder: Decoder, encoder: Encoder | None, bits: int, refinements: int
) -> Tensor:
    """Codes (N, channels, grid, grid) of embeddings, refined for a decoder that is fixed.

    Adam on each patch's own embedding, `refinements` steps from the encoder's (from 0 without
    one), the best codes of every patch kept. Deterministic.
    """
    parameters = decoder.parameters(torch.float32, patches.values.device)
    with one_thread():
        return torch.cat(
            [
                _embed_batch(part, decoder.shape, parameters, encoder, bits, refinements)
                for part in patches.batches()
            ]
        )


def _embed_batch(
    part: Patches,
    shape: DecoderShape,
    parameters: Parameters,
    encoder: Encoder | None,
    bits: int,
    refinements: int,
) -> Tensor:
    size = (len(part), shape.channels, shape.grid, shape.grid)
    with torch.no_grad():
        start = torch.zeros(size) if encoder is None else encoder(part.values)
    e = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([e], lr=REFINEMENT_RATE)
    best, least = embedding_codes(start, bits), torch.full((len(part),), torch.inf)
    scale = float(part.energy.sum()) or 1.0
    for _ in range(refinements + 1):
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
