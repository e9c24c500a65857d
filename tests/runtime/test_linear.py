"""The torch module computes what its decoded weight would, and moves like any other."""

from __future__ import annotations

import copy
import sys

import pytest
import torch

from convex_caldera import quantizers, transforms
from convex_caldera.core.recipe import FactorCoding, FitLowRank, Quantize, Recipe
from convex_caldera.errors import FormatError, ShapeError
from convex_caldera.quantizers import ClippedUniform, DoubleScale, KMeans, LloydMax, StripOrder
from convex_caldera.quantizers.e8p import E8P
from convex_caldera.quantizers.normal_float import NormalFloat
from convex_caldera.quantizers.trellis import Trellis
from convex_caldera.quantizers.uniform import Uniform
from convex_caldera.runtime import CompressedLinear
from convex_caldera.runtime.kernels import REFERENCE, TABLE, named_kernel, reference
from tests.storage.making import RECIPES, Flip, code, make_layer

CASES = {
    "codes": RECIPES[0],
    "two stages": RECIPES[1],
    "dense factors": RECIPES[2],
    "coded factors": RECIPES[3],
    "transformed": Recipe((Quantize(E8P(2), "identity"),), transforms=(Flip(), Flip())),
    "only factors": Recipe((FitLowRank(2),)),
    "two low ranks": Recipe(
        (FitLowRank(2), FitLowRank(1, factors=FactorCoding(Uniform(4, search=False))))
    ),
}
# float32 sums of some hundred products in another order
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(autouse=True)
def _flip_in_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(transforms.TABLE, "flip", Flip)


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(24, 40), (7, 19)])
@pytest.mark.parametrize("case", CASES)
def test_forward_is_the_decoded_weight(case: str, shape: tuple[int, int], bias: bool) -> None:
    layer = make_layer(gaussian(*shape), CASES[case])
    b = gaussian(shape[0], seed=1) if bias else None
    module = CompressedLinear.from_layer(layer, b)
    x = gaussian(2, 3, shape[1], seed=2)
    expected = torch.nn.functional.linear(x, layer.decode(), b)
    torch.testing.assert_close(module(x), expected, **TOLERANCE)
    torch.testing.assert_close(module.dequantize()(x), expected, **TOLERANCE)
    assert (module.out_features, module.in_features) == shape


@pytest.mark.parametrize("case", CASES)
def test_gradient_is_that_of_the_decoded_weight(case: str) -> None:
    layer = make_layer(gaussian(24, 40), CASES[case])
    module = CompressedLinear.from_layer(layer)
    x = gaussian(5, 40, seed=2).requires_grad_()
    up = gaussian(5, 24, seed=3)
    module(x).backward(up)
    torch.testing.assert_close(x.grad, up @ layer.decode(), **TOLERANCE)
    for name, parameter in module.named_parameters():
        if parameter.numel():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cast_leaves_codes_and_scales_alone(dtype: torch.dtype) -> None:
    module = CompressedLinear.from_layer(make_layer(gaussian(24, 40), CASES["coded factors"]))
    before = module.packed.clone()
    x = gaussian(3, 40, seed=2)
    expected = module(x)
    module.to(dtype)
    assert module.packed.dtype == torch.uint8 and torch.equal(module.packed, before)
    out = module(x.to(dtype))
    assert out.dtype == dtype
    steps = torch.finfo(dtype).eps * 8
    torch.testing.assert_close(out.float(), expected, rtol=steps, atol=steps * 10)


def test_state_dict_has_the_names_of_the_file_and_loads() -> None:
    layers = [make_layer(gaussian(24, 40, seed=i), CASES["dense factors"]) for i in range(2)]
    one, two = (CompressedLinear.from_layer(layer, gaussian(24)) for layer in layers)
    assert set(one.state_dict()) == {"packed", "left_0", "right_0", "bias"}
    x = gaussian(3, 40, seed=2)
    one(x)
    one.load_state_dict(two.state_dict())
    assert torch.equal(one(x), two(x))


def test_copies_and_replaced_buffers_are_noticed() -> None:
    layers = [make_layer(gaussian(24, 40, seed=i), CASES["codes"]) for i in range(2)]
    one, two = (CompressedLinear.from_layer(layer) for layer in layers)
    x = gaussian(3, 40, seed=2)
    first = one(x)
    other = copy.deepcopy(one)
    one.packed = two.packed
    assert torch.equal(one(x), two(x))
    assert torch.equal(other(x), first)


@pytest.mark.parametrize("case", CASES)
def test_peft_finds_a_parameter(case: str) -> None:
    module = CompressedLinear.from_layer(make_layer(gaussian(24, 40), CASES[case]))
    assert next(module.parameters()).device == torch.device("cpu")
    assert set(module.state_dict()) <= {"packed"} | {
        f"{s}_{i}" for s in ("left", "right") for i in (0, 1)
    }
    module.load_state_dict(module.state_dict())


def test_wrong_input_names_both_sizes() -> None:
    module = CompressedLinear.from_layer(make_layer(gaussian(24, 40), CASES["codes"]))
    with pytest.raises(ShapeError, match=r"40.*39"):
        module(gaussian(2, 39))


def test_layer_comes_back() -> None:
    layer = make_layer(gaussian(24, 40), CASES["dense factors"])
    again = CompressedLinear.from_layer(layer).layer()
    torch.testing.assert_close(again.decode(), layer.decode(), **TOLERANCE)
    with pytest.raises(FormatError):
        CompressedLinear.from_layer(make_layer(gaussian(4, 8), Recipe((FitLowRank(0),))))


QUANTIZERS = {
    "e8p2": E8P(2),
    "e8p3": E8P(3),
    "e8p4": E8P(4),
    **{f"uniform{b}": Uniform(b, group_size=16, search=False) for b in (1, 2, 3, 5, 8)},
    "nf3": NormalFloat(3, group_size=8),
    "trellis": Trellis(2.0, 6),
    "lloyd-max": LloydMax(3, group_size=8),
    "k-means": KMeans(1.25, 4),
    "clipped": ClippedUniform(3, 0),
    "double scale": DoubleScale(KMeans(2, 2), 8),
    "strips": StripOrder(DoubleScale(NormalFloat(2, -1), 8), 16),
    "chained trellis": Trellis(1.5, 6, chain=2, row_scales=True),
    "per row": Uniform(3, group_size=0, symmetric=True, search=False),
}


@pytest.mark.parametrize("tokens", [1, 3, 9])
@pytest.mark.parametrize("shape", [(48, 40), (37, 21), (5, 8)])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_kernels_agree_with_decoding(
    name: str, shape: tuple[int, int], tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    coded = code(QUANTIZERS[name], gaussian(*shape))
    packed, W = coded.fitted.pack(coded.codes), coded.decode()
    # an odd address, as a slice of a layer's bytes may have
    packed = torch.cat([torch.zeros(1, dtype=torch.uint8), packed])[1:]
    x, y = gaussian(tokens, shape[1], seed=1), gaussian(tokens, shape[0], seed=2)
    kind = QUANTIZERS[name].kind
    others = [named_kernel(module) for (k, device), module in TABLE.items() if k == kind]
    for kernel in [REFERENCE, *others]:
        home = sys.modules[kernel.forward.__module__]
        monkeypatch.setattr(home, "SLICE_VALUES", 16 * shape[1])  # several slices
        torch.testing.assert_close(kernel.forward(coded.fitted, packed, x), x @ W.T, **TOLERANCE)
        torch.testing.assert_close(kernel.transposed(coded.fitted, packed, y), y @ W, **TOLERANCE)
        pieces = [values.clone() for _, values in home.decoded_slices(coded.fitted, packed)]
        exact = 1e-6 if kind == "e8p" else 0.0  # E8P rounds its two stages in another order
        torch.testing.assert_close(torch.cat(pieces), W, rtol=exact, atol=exact)


def test_unknown_packing_is_decoded_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(reference.PLANES) | set(reference.WHOLE) == set(quantizers.TABLE)
    coded = code(Uniform(3, search=False), gaussian(37, 21))
    monkeypatch.setattr(reference, "SLICE_VALUES", 16 * 21)
    monkeypatch.setattr(reference, "PLANES", {})
    packed = coded.fitted.pack(coded.codes)
    whole = torch.cat([values for _, values in reference.decoded_slices(coded.fitted, packed)])
    assert torch.equal(whole, coded.decode())
