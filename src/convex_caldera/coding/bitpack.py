"""Fixed-width codes in a little-endian bit stream, no waste but the end of the last byte.

Code i occupies the bits i b .. (i + 1) b - 1 of the stream, least significant bit first, and bit
k of the stream is bit k mod 8 of byte k // 8. Eight codes fill exactly b bytes, so packing works
on rows of eight: code k of a row touches the at most three bytes from (k b) // 8 on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from convex_caldera.errors import FormatError, RecipeError

MAX_BITS = 16
_CHUNK = 1 << 20  # codes per chunk: the temporaries stay in cache


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take."""
    return (count * _checked_bits(bits) + 7) // 8


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Codes as a byte stream, in row-major order.

    Args:
        codes: integer tensor of any shape, values 0 .. 2**bits - 1.
        bits: 1 .. 16 per code.

    Returns:
        uint8, 1-D, ceil(count * bits / 8) long, on the same device; padding bits are zero.

    Raises:
        RecipeError: bits out of range.
        FormatError: a code out of range.

    Cost: about three integer operations per code.
    """
    flat = codes.reshape(-1)
    _check_range(flat, _checked_bits(bits))
    packed = [_pack_chunk(chunk, bits) for chunk in flat.split(_CHUNK)]
    return torch.cat(packed)[: packed_bytes(flat.numel(), bits)]


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of `pack_bits`.

    Args:
        packed: uint8, 1-D, exactly ceil(count * bits / 8) long.
        bits: 1 .. 16 per code.
        count: how many codes.

    Returns:
        (count,) codes, uint8 up to 8 bits and int32 above.

    Raises:
        RecipeError: bits out of range.
        FormatError: not a flat uint8 tensor, wrong length, or padding bits that are not zero.
    """
    _check_stream(packed, bits, count)
    step = _CHUNK // 8 * bits
    codes = [_unpack_chunk(chunk, bits) for chunk in packed.split(step)]
    return torch.cat(codes)[:count]


def _pack_chunk(codes: Tensor, bits: int) -> Tensor:
    rows = (codes.numel() + 7) // 8
    padded = torch.zeros(8, rows, dtype=torch.int32, device=codes.device)
    full = codes.numel() // 8
    padded[:, :full] = codes[: full * 8].view(full, 8).T
    padded[: codes.numel() - full * 8, full:] = codes[full * 8 :, None]
    out = torch.zeros(bits, rows, dtype=torch.int32, device=codes.device)
    for k in range(8):
        first, shift = divmod(k * bits, 8)
        for byte in range(first, (k * bits + bits + 7) // 8):
            move = shift - 8 * (byte - first)
            out[byte] |= padded[k] << move if move >= 0 else padded[k] >> -move
    return (out & 255).to(torch.uint8).T.reshape(-1)


def _unpack_chunk(packed: Tensor, bits: int) -> Tensor:
    rows = -(-packed.numel() // bits)
    padded = torch.nn.functional.pad(packed, (0, rows * bits - packed.numel()))
    columns = padded.view(rows, bits).T.to(torch.int32).contiguous()
    out = torch.empty(8, rows, dtype=torch.int32, device=packed.device)
    for k in range(8):
        first, shift = divmod(k * bits, 8)
        value = columns[first] >> shift
        for byte in range(first + 1, (k * bits + bits + 7) // 8):
            value |= columns[byte] << (8 * (byte - first) - shift)
        out[k] = value & ((1 << bits) - 1)
    return out.to(torch.uint8 if bits <= 8 else torch.int32).T.reshape(-1)


def _checked_bits(bits: int) -> int:
    if not 1 <= bits <= MAX_BITS:
        raise RecipeError(f"codes have 1 to {MAX_BITS} bits, got {bits}")
    return bits


def _check_range(codes: Tensor, bits: int) -> None:
    if codes.is_floating_point() or codes.is_complex():
        raise FormatError(f"codes must be integers, got {codes.dtype}")
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < 1 << bits:
        least, most = int(codes.min()), int(codes.max())
        raise FormatError(
            f"codes of {bits} bits lie in 0 .. {(1 << bits) - 1}, got {least} .. {most}"
        )


def _check_stream(packed: Tensor, bits: int, count: int) -> None:
    length = packed_bytes(count, bits)
    if packed.dtype != torch.uint8 or packed.dim() != 1:
        raise FormatError(
            f"packed codes are a flat uint8 tensor, got {packed.dtype}, {tuple(packed.shape)}"
        )
    if packed.numel() != length:
        raise FormatError(f"{count} codes of {bits} bits take {length} bytes, got {packed.numel()}")
    spare = 8 * length - count * bits
    if spare and int(packed[-1]) >> (8 - spare):
        raise FormatError(
            f"the {spare} padding bits after {count} codes must be zero: altered file"
        )
