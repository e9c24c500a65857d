"""Randomness that depends on (seed, layer, purpose) only, never on order or worker."""

from __future__ import annotations

import hashlib

import torch


def derive_seed(seed: int, layer: str, purpose: str) -> int:
    """A 63-bit seed from SHA-256 of the three; the same on every machine."""
    digest = hashlib.sha256(f"{seed}|{layer}|{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, layer: str, purpose: str) -> torch.Generator:
    """A CPU generator of its own for one purpose in one layer."""
    return torch.Generator().manual_seed(derive_seed(seed, layer, purpose))


def random_signs(size: int, seed: int, name: str, purpose: str) -> torch.Tensor:
    """`size` independent signs, float32 +-1, from SHA-256 in counter mode (stable for ever)."""
    prefix = f"{seed}|{name}|{purpose}|".encode()
    blocks = range((size + 255) // 256)
    stream = b"".join(hashlib.sha256(prefix + str(i).encode()).digest() for i in blocks)
    bits = torch.frombuffer(bytearray(stream), dtype=torch.uint8)
    unpacked = (bits[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return 1.0 - 2.0 * unpacked.flatten()[:size].float()
