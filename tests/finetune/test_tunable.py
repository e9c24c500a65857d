"""A layer in training: nothing changes at first, what is stored is what was computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from convex_caldera.core.terms import Coded, CompressedLayer, Dense, LowRank, sum_terms
from convex_caldera.errors import RecipeError
from convex_caldera.finetune.factors import outer_left, outer_right, split
from convex_caldera.finetune.parts import PARTS, Wish, as_stored, tuned
from convex_caldera.finetune.place import Trained
from convex_caldera.finetune.tunable import TunableLinear, on_device
from convex_caldera.storage.codec import layer_from_tensors, layer_to_tensors
from tests.finetune.making import BUILDS, SHAPE, build, inputs, weight

LAYER_PARTS = [part for part in PARTS if part != "norms"]
# float32 products of 40 terms, and factors that were coded and are float16 now
CLOSE = {"rtol": 2e-3, "atol": 1e-2}
EXACT = {"rtol": 1e-4, "atol": 1e-4}


def tunable(name: str, *parts: str, rank: int = 2, **options: Any) -> TunableLinear:
    return TunableLinear("model.layer", build(name), None, Wish(parts, rank), **options)


def shake(layer: TunableLinear, seed: int = 1, by: float = 0.2) -> None:
    """Move every trained tensor away from its start."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for each in layer.tuned.values():
            each.phi.add_(by * torch.randn(each.phi.shape, generator=rng))


@pytest.mark.parametrize("parts", [*LAYER_PARTS, "lowrank,signs", "lora,dora,signs"])
@pytest.mark.parametrize("name", BUILDS)
def test_nothing_changes_before_the_first_step(name: str, parts: str) -> None:
    layer, x = tunable(name, *parts.split(",")), inputs()
    expected = x @ build(name).decode().T
    torch.testing.assert_close(layer(x), expected, **EXACT)
    torch.testing.assert_close(x @ layer.layer().decode().T, expected, **CLOSE)


@pytest.mark.parametrize("parts", [*LAYER_PARTS, "lora,dora,signs", "lowrank,dora,scales"])
@pytest.mark.parametrize("name", BUILDS)
def test_what_is_stored_is_what_was_computed(name: str, parts: str) -> None:
    layer, x = tunable(name, *parts.split(",")), inputs()
    shake(layer)
    with Trained({"l": layer}, {}, {}).as_stored():
        computed, stored = layer(x), layer.layer()
    spec, tensors = layer_to_tensors(stored)
    read = layer_from_tensors(spec, tensors)
    torch.testing.assert_close(x @ read.decode().T, computed, **EXACT)
    again = TunableLinear("model.layer", read, None, Wish(tuple(parts.split(",")), 2))
    torch.testing.assert_close(again(x), computed, **EXACT)


@pytest.mark.parametrize("name", BUILDS)
def test_codes_never_change(name: str) -> None:
    before = build(name)
    layer = TunableLinear("l", before, None, Wish(("lora", "dora", "signs", "scales"), 2))
    shake(layer)
    codes = [t.codes for t in before.terms if isinstance(t, Coded)]
    kept = [t.codes for t in layer.layer().terms if isinstance(t, Coded)]
    assert codes and all(torch.equal(a, b) for a, b in zip(codes, kept, strict=True))


def dense_forward(layer: CompressedLayer, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """The same layer with these factors, as one matrix through the transforms' inverses."""
    inner = left @ right
    for term in layer.terms:
        inner = inner + (term.decode() if isinstance(term, Coded) else 0)
    for transform in reversed(layer.transforms):
        inner = transform.invert(inner)
    return x @ inner.T


@pytest.mark.parametrize("name", ["dense factors", "caldera", "inputs alone", "two transforms"])
@pytest.mark.parametrize("cached", [True, False])
def test_gradients_of_factors_are_those_of_the_dense_weight(name: str, cached: bool) -> None:
    before, x = build(name), inputs()
    layer = TunableLinear("l", before, None, Wish(("lowrank",)), cached=cached)
    (term,) = [t for t in before.terms if isinstance(t, LowRank)]
    left, right = (
        side.clone().requires_grad_() for side in (term.left_matrix(), term.right_matrix())
    )
    x_dense, x_fast = x.clone().requires_grad_(), x.clone().requires_grad_()
    dense_forward(before, x_dense, left, right).square().sum().backward()
    layer(x_fast).square().sum().backward()
    found = {key.split("_")[0]: each for key, each in layer.tuned.items()}
    for side, expected in (("left", left.grad), ("right", right.grad)):
        gradient = found[side].phi.grad / found[side].unit
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(x_fast.grad, x_dense.grad, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        *((name, "scales") for name in BUILDS),
        *((name, "codebooks") for name in ("strips", "levels", "trained trellis")),
    ],
)
def test_scales_and_codebooks_get_the_gradient_of_the_weight(name: str, part: str) -> None:
    layer, x = tunable(name, part), inputs()
    layer(x).square().sum().backward()
    key, each = next(iter(layer.tuned.items()))
    with torch.no_grad():
        index = each.phi.numel() // 2
        step = 2.0**-7
        losses = []
        for sign in (1, -1):
            each.phi.view(-1)[index] += sign * step
            losses.append(float(layer(x).double().square().sum()))
            each.phi.view(-1)[index] -= sign * step
    slope = (losses[0] - losses[1]) / (2 * step)
    assert float(each.phi.grad.view(-1)[index]) == pytest.approx(slope, rel=0.02, abs=0.05), key


def test_dora_scales_rows_to_its_magnitudes() -> None:
    layer = tunable("caldera", "lowrank", "dora")
    shake(layer)
    ratio = layer.tuned["magnitude"].value()
    W = build("caldera").decode()
    norms = layer.layer().decode().norm(dim=1)
    torch.testing.assert_close(norms, ratio.abs() * W.norm(dim=1), rtol=2e-3, atol=1e-3)
    alone = tunable("uniform", "dora")
    alone(inputs()).sum().backward()
    assert alone.tuned["magnitude"].phi.grad is not None


def test_lora_trains_some_components_and_keeps_the_others_coded() -> None:
    layer = tunable("caldera", "lora", rank=1)
    terms = layer.layer().terms
    kinds = [(type(t.right), t.rank) for t in terms if isinstance(t, LowRank)]
    assert kinds == [(Dense, 1), (Coded, 3)]
    fresh = tunable("trellis", "lora", rank=3).layer()
    assert [t.rank for t in fresh.terms if isinstance(t, LowRank)] == [3]
    whole = tunable("caldera", "lora", rank=99).layer()
    assert [t.rank for t in whole.terms if isinstance(t, LowRank)] == [4]


def test_growth_is_the_16_bits_of_what_was_trained() -> None:
    before = build("caldera")
    m, n = SHAPE
    signs = tunable("caldera", "signs").layer()
    assert signs.stored_bytes() - before.stored_bytes() == 2 * (m + n)
    factors = tunable("caldera", "lowrank").layer()
    (term,) = [t for t in before.terms if isinstance(t, LowRank)]
    assert factors.stored_bytes() - before.stored_bytes() == 2 * 4 * (m + n) - term.stored_bytes()
    assert tunable("caldera", "scales").layer().stored_bytes() == before.stored_bytes()


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("name", ["caldera", "dense factors"])
def test_split_factors_decode_to_the_whole(name: str, rank: int) -> None:
    (term,) = [t for t in build(name).terms if isinstance(t, LowRank)]
    first, rest = split(term, rank)
    parts = first.decode() if rest is None else first.decode() + rest.decode()
    torch.testing.assert_close(parts, term.decode(), rtol=1e-5, atol=1e-5)
    assert first.rank == rank


@pytest.mark.parametrize("name", BUILDS)
def test_factors_move_outside_of_the_transforms(name: str) -> None:
    transforms = build(name).transforms
    m, n = SHAPE
    left, right = weight((m, 3), 2), weight((3, n), 3)
    inner = left @ right
    for transform in reversed(transforms):
        inner = transform.invert(inner)
    outside = outer_left(left, transforms) @ outer_right(right, transforms)
    torch.testing.assert_close(outside, inner, rtol=1e-4, atol=1e-4)


def test_units_are_powers_of_two_and_rounding_is_exact() -> None:
    each = tuned(0.037 * weight(), torch.float16)
    assert each.unit == 2.0 ** round(torch.tensor(each.unit).log2().item())
    with as_stored([each]):
        assert torch.equal(each.value().half().float(), each.value())
    assert not torch.equal(each.value().half().float(), each.value())
    assert tuned(torch.zeros(3), torch.float16).unit == 1.0


@pytest.mark.parametrize(
    ("parts", "rank"), [((), 4), (("lowrank", "lora"), 4), (("everything",), 4), (("lora",), 0)]
)
def test_impossible_wishes_are_refused(parts: tuple[str, ...], rank: int) -> None:
    with pytest.raises(RecipeError):
        Wish(parts, rank)


@pytest.mark.parametrize("name", BUILDS)
def test_terms_on_a_device_decode_to_the_same(name: str) -> None:
    layer = build(name)
    moved = on_device(layer.terms, layer.shape, torch.device("cpu"))
    assert torch.equal(sum_terms(moved, layer.shape), sum_terms(list(layer.terms), layer.shape))
