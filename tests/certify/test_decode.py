"""The checker's decoders against the library's, bit for bit over shapes and options."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from convex_caldera import quantizers, transforms
from convex_caldera.certify import decode_hadamard, decode_normal_float
from convex_caldera.certify.codec import check_record
from convex_caldera.certify.decode_table import QUANTIZERS, TRANSFORMS
from convex_caldera.core.hessian import Hessian
from convex_caldera.errors import FormatError
from convex_caldera.linalg.hadamard import base_order, rotate
from convex_caldera.quantizers import Trellis, Uniform
from convex_caldera.recipes.records import to_record
from convex_caldera.storage.shard import NAMES
from convex_caldera.transforms.diagonal import Diagonal
from convex_caldera.transforms.hadamard import RandomizedHadamard
from convex_caldera.transforms.permute import ActOrder
from convex_caldera.transforms.scale import ColumnScale
from tests.examples import first
from tests.quantizers_tried import EXAMPLES, STORED

SHAPES = [(1, 1), (3, 5), (16, 16), (17, 33), (40, 24), (8, 130)]
EVERY = [*EXAMPLES, *STORED]


def stored(owner) -> dict[str, np.ndarray]:
    """Tensors as the checker sees them: numpy, bfloat16 widened to float32."""
    return {
        name: (t.float() if t.dtype == torch.bfloat16 else t).numpy() for name, t in owner.items()
    }


def random_codes(quantizer, shape, seed):
    """A fitted quantizer and codes that are spread over everything that can be stored."""
    W = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    fitted = quantizer.fit(W)
    packed = fitted.pack(fitted.encode(W))
    if not isinstance(quantizer, Uniform) or not quantizer.legacy_levels:
        noise = torch.randint(0, 256, packed.shape, generator=torch.Generator().manual_seed(seed))
        candidate = noise.to(torch.uint8)
        try:
            fitted.unpack(candidate)
            packed = candidate
        except FormatError:  # spare bits must be zero: keep the honest codes
            pass
    return fitted, packed


@pytest.mark.parametrize("quantizer", EVERY, ids=str)
def test_quantizer_decodes_bit_for_bit(quantizer):
    record = to_record(quantizer)
    known = QUANTIZERS[record["kind"]]
    check_record(record, known.options, "record")
    for shape in SHAPES:
        fitted, packed = random_codes(quantizer, shape, seed=sum(shape))
        tensors = {**fitted.tensors(), "codes": packed}
        layout = {name: (NAMES[t.dtype], tuple(t.shape)) for name, t in tensors.items()}
        assert known.layout(record, shape) == layout
        expected = fitted.decode(fitted.unpack(packed)).numpy()
        found = known.decode(record, shape, stored(tensors))
        assert found.dtype == np.float32
        assert np.array_equal(found.view(np.uint32), expected.view(np.uint32)), shape


@pytest.mark.parametrize("quantizer", first(len(EXAMPLES) // 3, EVERY[::3]), ids=str)
def test_quantizer_refuses_spare_bits_or_keeps_every_bit(quantizer):
    """Flipping any stored bit is noticed, or changes a value, or is a code of equal value."""
    fitted, packed = random_codes(quantizer, (5, 11), seed=3)
    record = to_record(quantizer)
    known, tensors = QUANTIZERS[record["kind"]], stored({**fitted.tensors(), "codes": packed})
    for byte in range(len(packed)):
        for bit in range(8):
            changed = tensors["codes"].copy()
            changed[byte] ^= 1 << bit
            try:
                expected = fitted.decode(fitted.unpack(torch.from_numpy(changed))).numpy()
            except FormatError:
                with pytest.raises(FormatError):
                    known.decode(record, (5, 11), {**tensors, "codes": changed})
                continue
            found = known.decode(record, (5, 11), {**tensors, "codes": changed})
            assert np.array_equal(found, expected)


@pytest.mark.parametrize("sixteenths", [16, 17, 31, 59, 100, 127, 128])
def test_trellis_tiles_of_every_size_take_the_same_bytes(sixteenths):
    """Bits of a short tile are rounded down to whole bits, then up to whole bytes."""
    quantizer = Trellis(sixteenths / 16, 12)
    for shape in itertools.product((1, 3, 16, 18), range(1, 34)):
        expected = quantizer.layout(shape)["codes"][1]
        found = QUANTIZERS["trellis"].layout(to_record(quantizer), shape)["codes"][1]
        assert found == expected, shape


def test_checker_knows_every_kind_and_every_option():
    for ours, theirs in ((QUANTIZERS, quantizers.TABLE), (TRANSFORMS, transforms.TABLE)):
        assert set(ours) == set(theirs)
        for kind, cls in theirs.items():
            fields = {f.name for f in dataclasses.fields(cls)}
            assert set(ours[kind].options) == fields, kind


@pytest.mark.parametrize("bits", range(2, 9))
def test_normal_float_levels_match(bits):
    from convex_caldera.quantizers.normal_float import levels

    assert np.array_equal(decode_normal_float.levels(bits), levels(bits).numpy())


# 12, 24: Paley I of 11, 23; 28: of 27 = 3^3; 20: of 19; 36: Paley II of 17; 52: II of 25 = 5^2;
# 56 x 2: beyond the smallest t; 92, 172: none at t = 2; 7, 22, 26: Hartley
ORDERS = [
    1,
    2,
    8,
    12,
    20,
    24,
    28,
    36,
    52,
    68,
    92,
    100,
    112,
    172,
    184,
    244,
    344,
    7,
    22,
    26,
    384,
    500,
]


@pytest.mark.parametrize("n", ORDERS)
def test_rotation_matches_and_is_orthogonal(n):
    identity = np.eye(n)
    back = decode_hadamard.rotate_back(identity)
    expected = rotate(torch.eye(n, dtype=torch.float64), inverse=True).numpy()
    assert np.allclose(back, expected, atol=1e-13), base_order(n)
    assert np.allclose(back @ back.T, identity, atol=1e-12)


# 344 = 7^3 + 1, 724 = 2 (19^2 + 1), 1060: beyond the cap
@pytest.mark.parametrize("orders", [range(4, 240, 4), (244, 344, 500, 724, 1060)])
def test_rotation_bases_match(orders):
    for n in orders:
        kind, order = base_order(n)
        base = decode_hadamard.base_matrix(n)
        assert (1 if base is None else len(base)) == order, n
        if kind == "paley2" or (kind == "paley1" and not _is_prime(order - 1)):
            expected = rotate(torch.eye(order, dtype=torch.float64), inverse=True).numpy()
            assert np.allclose(base, expected, atol=1e-13), n


def _is_prime(q):
    return all(q % d for d in range(2, int(q**0.5) + 1))


@pytest.mark.parametrize("shape", [(12, 20), (7, 64), (33, 6)], ids=str)
@pytest.mark.parametrize(
    "transform",
    [
        RandomizedHadamard(),
        RandomizedHadamard(outputs=False),
        RandomizedHadamard(inputs=False),
        ColumnScale(0.5),
        ActOrder(),
    ],
    ids=str,
)
def test_transform_is_undone(transform, shape):
    generator = torch.Generator().manual_seed(1)
    W = torch.randn(shape, generator=generator, dtype=torch.float64)
    X = torch.randn(50, shape[1], generator=generator, dtype=torch.float64)
    fitted = transform.fit(W, Hessian(X.T @ X / 50), seed=1, layer="l", site="s")
    record = to_record(transform)
    known = TRANSFORMS[record["kind"]]
    check_record(record, known.options, "record")
    tensors = fitted.tensors()
    layout = {name: (NAMES[t.dtype], tuple(t.shape)) for name, t in tensors.items()}
    assert known.layout(record, shape) == layout
    inner = fitted.apply(W).numpy()
    found = known.invert(record, inner, {name: t.numpy() for name, t in tensors.items()})
    assert np.allclose(found, W.numpy(), atol=1e-12)
    assert np.allclose(found, fitted.invert(torch.from_numpy(inner)).numpy(), atol=1e-13)


@pytest.mark.parametrize("inputs", [True, False])
@pytest.mark.parametrize("outputs", [True, False])
def test_tuned_diagonals_are_undone(inputs, outputs):
    if not (inputs or outputs):
        with pytest.raises(FormatError, match="neither side"):
            TRANSFORMS["diagonal"].invert({"inputs": False, "outputs": False}, np.eye(2), {})
        return
    transform = Diagonal(inputs, outputs)
    generator = torch.Generator().manual_seed(1)
    tensors = {
        name: (torch.rand(shape, generator=generator) + 0.5).half()
        for name, (_, shape) in transform.layout((7, 9)).items()
    }
    W = torch.randn(7, 9, generator=generator, dtype=torch.float64)
    arrays = {name: t.numpy() for name, t in tensors.items()}
    found = TRANSFORMS["diagonal"].invert(to_record(transform), W.numpy(), arrays)
    expected = transform.restore((7, 9), tensors).invert(W).numpy()
    assert np.allclose(found, expected, atol=1e-13)
    for name in arrays:
        with pytest.raises(FormatError, match="zero"):
            TRANSFORMS["diagonal"].invert(
                to_record(transform), W.numpy(), {**arrays, name: arrays[name] * 0}
            )
