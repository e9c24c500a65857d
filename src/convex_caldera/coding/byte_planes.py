"""Lossless coding of floating-point tensors: their exponents are entropy-coded.

Weights of one tensor use few of the exponents that their type has: 8 exponent bits of bfloat16
carry about 2.6 bits. Each number, as an unsigned integer, is rotated left by one bit, so that
the exponent fills the upper byte (with three bits of the significand for float16) and the sign is
the last bit. Bytes of equal place form planes, from the upper to the lower; a plane is coded by
rANS if that is shorter, else kept: the lower bits of weights are noise, unless they are zeros of
a type that was narrower once. A stream is, for each plane,

    1 if coded, 0 if kept (1 byte), its bytes (8 bytes, little-endian); then all planes.

Source: the same idea in ZipNN (Hershcovitch et al., arXiv 2411.05239) and DFloat11 (Zhang et al.,
arXiv 2504.11651), with Huffman codes.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from convex_caldera.coding.rans import Rans
from convex_caldera.errors import FormatError

Bytes = NDArray[np.uint8]
ELEMENT_TYPES = {2: np.dtype("<u2"), 4: np.dtype("<u4")}
_PLANE_HEADER = 9
_CODER = Rans(8)


def encode_planes(raw: memoryview | bytes | bytearray, element_bytes: int) -> Bytes:
    """The bytes of floating-point numbers of 2 or 4 bytes as a shorter stream.

    Cost: about 30 ns a number; memory of a few times the tensor.
    """
    numbers = np.frombuffer(raw, ELEMENT_TYPES[element_bytes])
    rotated = (numbers << 1) | (numbers >> (8 * element_bytes - 1))
    planes = rotated.view(np.uint8).reshape(-1, element_bytes)
    headers, bodies = [], []
    for place in reversed(range(element_bytes)):
        plane = np.ascontiguousarray(planes[:, place])
        coded = _CODER.encode(torch.from_numpy(plane)).numpy()
        body = coded if coded.size < plane.size else plane
        mark = bytes([body is coded]) + int(body.size).to_bytes(8, "little")
        headers.append(np.frombuffer(mark, np.uint8))
        bodies.append(body)
    return np.concatenate([*headers, *bodies])


def decode_planes(stream: Bytes, count: int, element_bytes: int) -> Bytes:
    """The bytes of `count` numbers back. Raises FormatError unless the stream is exactly that."""
    start = _PLANE_HEADER * element_bytes
    if stream.size < start:
        raise FormatError(f"a losslessly coded tensor of {stream.size} bytes is truncated")
    planes = np.empty((count, element_bytes), np.uint8)
    for k in range(element_bytes):
        header = stream[_PLANE_HEADER * k : _PLANE_HEADER * (k + 1)].tobytes()
        size = int.from_bytes(header[1:], "little")
        if header[0] > 1 or size > stream.size - start:
            raise FormatError(f"plane {k} of a losslessly coded tensor is truncated or altered")
        body = stream[start : start + size]
        start += size
        if header[0]:
            body = _CODER.decode(torch.from_numpy(body.copy()), count).numpy()
        if body.size != count:
            raise FormatError(f"plane {k} has {body.size} bytes for {count} numbers")
        planes[:, element_bytes - 1 - k] = body
    if start != stream.size:
        raise FormatError("a losslessly coded tensor goes on after its last plane")
    rotated = planes.reshape(-1).view(ELEMENT_TYPES[element_bytes])
    numbers = (rotated >> 1) | (rotated << (8 * element_bytes - 1))
    return numbers.view(np.uint8)
