"""A stored layer as a float64 matrix: the sum of its terms, taken back through its transforms.

    W^ = T_1^-1( T_2^-1( ... ( sum of terms ) ) ),   term = decoded codes | left @ right

Coded values are exactly the float32 numbers that the format defines; everything after is float64,
so the result differs from the real-number value by about 1e-15 relative, and from a float32
decoder by that decoder's own rounding (see losses.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from convex_caldera.certify.codec import Array, finite
from convex_caldera.certify.decode_entropy import fixed_width
from convex_caldera.certify.decode_neural import DECODER, neural_core
from convex_caldera.certify.decode_table import QUANTIZERS, TRANSFORMS
from convex_caldera.certify.reader import Layer
from convex_caldera.certify.shard import ELEMENT_BYTES, from_bytes
from convex_caldera.certify.specs import PACKED, Coded, LayerSpec
from convex_caldera.certify.strict import short
from convex_caldera.errors import FormatError

Floats = NDArray[np.float64]
WORKING_BYTES = 40  # per weight while decoding: a few float64 copies


def decode(layer: Layer) -> Floats:
    """W^ (m, n). Raises FormatError if anything stored is impossible or not finite."""
    return decode_with_norm(layer)[0]


def decode_with_norm(layer: Layer) -> tuple[Floats, float]:
    """W^ (m, n), and the sum of the Frobenius norms of its terms in their own coordinates.

    Memory: about 40 bytes a weight; layers beyond the machine's memory are refused.
    """
    m, n = layer.spec.shape
    if m * n * WORKING_BYTES > physical_memory():
        raise FormatError(
            f"{short(layer.name)}: decoding {m} x {n} needs more memory than there is"
        )
    W, norm = np.zeros((m, n)), 0.0
    owners = _split(layer.spec, _packed(layer))
    for term in _terms(layer, owners[len(layer.spec.transforms) :]):
        W += term
        norm += float(np.linalg.norm(term.astype(np.float64)))
    for coded, tensors in reversed(list(zip(layer.spec.transforms, owners, strict=False))):
        W = TRANSFORMS[coded.record["kind"]].invert(coded.record, W, tensors)
    if not np.isfinite(W).all():
        raise FormatError(f"{short(layer.name)}: decodes to NaN or infinite weights")
    return W, norm


def _terms(layer: Layer, owners: list[dict[str, Array]]) -> Iterator[Array]:
    """Values of every term; `owners` are the tensors of the coded ones, in order."""
    rest = iter(owners)
    for i, term in enumerate(layer.spec.terms):
        if isinstance(term, Coded):
            yield _values(layer, term, next(rest))
            continue
        left = _factor(layer, term.left, f"left_{i}", rest)
        right = _factor(layer, term.right, f"right_{i}", rest)
        yield (left if term.left is None else left.T) @ right


def _factor(
    layer: Layer, coded: Coded | None, field: str, rest: Iterator[dict[str, Array]]
) -> Floats:
    """A factor in float64, as stored: a coded left is the transpose."""
    if coded is not None:
        return _values(layer, coded, next(rest)).astype(np.float64)
    return finite(layer.shard.array(f"{layer.name}.{field}"), field).astype(np.float64)


def _values(layer: Layer, coded: Coded, tensors: dict[str, Array]) -> NDArray[np.float32]:
    tensors = {**tensors, **_borrowed(layer, coded)}
    if coded.coder is not None:
        fixed = fixed_width(coded.coder, tensors["codes"], coded.code_bytes)
        tensors = {**tensors, "codes": fixed}
    return QUANTIZERS[coded.record["kind"]].decode(coded.record, coded.shape, tensors)


def _borrowed(layer: Layer, coded: Coded) -> dict[str, Array]:
    """The decoder of a neural record that is stored with another layer (rule F20)."""
    prefix, core = neural_core(coded.record)
    if core is None or not core["home"]:
        return {}
    home = layer.others.get(core["home"])
    if home is None:
        raise FormatError(f"{short(layer.name)}: no layer {short(core['home'])} to borrow from")
    for owner, tensors in zip(home.spec.owners, _split(home.spec, _packed(home)), strict=True):
        inner, stored = neural_core(owner.record)
        if stored is not None and not stored["home"]:
            return {prefix + name: tensors[inner + name] for name in DECODER}
    raise FormatError(f"{short(core['home'])}: a decoder is borrowed, but it stores none")


def _packed(layer: Layer) -> bytes:
    if not layer.spec.parts:
        return b""
    return layer.shard.array(f"{layer.name}.{PACKED}").tobytes()


def _split(spec: LayerSpec, packed: bytes) -> list[dict[str, Array]]:
    """The parts of `packed` by owner and field; the padding must be zero."""
    owners: list[dict[str, Array]] = [{} for _ in spec.owners]
    position = 0
    for owner, field, dtype, shape in spec.parts:
        size = int(np.prod(shape, dtype=np.int64)) * ELEMENT_BYTES[dtype]
        owners[owner][field] = from_bytes(packed[position : position + size], dtype, shape)
        position += size
    if any(packed[position:]):
        raise FormatError("the padding after the last part of `packed` is not zero")
    return owners


def physical_memory() -> int:
    """Bytes of memory of this machine, as far as the system tells; else 16 GB."""
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 16 << 30
