"""Nothing mixes devices: every quantizer, transform and method on tensors that say they are

elsewhere (`pretend`), from fitting to the runtime module's products. Kernels compiled for the CPU
move what they need there and back; whatever comes out is where the input was, and equal.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from convex_caldera import quantizers
from convex_caldera.core.hessian import Hessian
from convex_caldera.core.problem import Problem
from convex_caldera.core.protocols import Quantizer
from convex_caldera.core.recipe import Quantize, Recipe
from convex_caldera.fit.backfit import Fit, fit_layer
from convex_caldera.fit.nuclear_norm import fit_nuclear_norm
from convex_caldera.quantizers import E8P, KMeans, StripOrder, Trellis, Uniform
from convex_caldera.recipes.ladder import Wishes
from convex_caldera.recipes.table import METHODS
from convex_caldera.runtime.linear import CompressedLinear
from convex_caldera.transforms import RandomizedHadamard
from tests.devices.pretend import Pretended, pretended
from tests.quantizers.test_laws import EXAMPLES

SHAPE = (32, 48)
SMALL = (8, 18)  # a trellis takes a dozen operators a weight
QUANTIZERS: list[Quantizer] = [
    *{q.kind: q for q in EXAMPLES if q.kind != "trellis"}.values(),  # the last of each kind
    Uniform(3, 7, symmetric=True),
    KMeans(2.5, 2, group_size=16),
    E8P(3),
    StripOrder(Uniform(2, 16), strip=8),
    Trellis(2.0, state_bits=6),
    Trellis(2.5, state_bits=6, chain=1, row_scales=True),
    Trellis(2.0, state_bits=20, chain=2, encoder="beam", survivors=16),
    Trellis(2.0, state_bits=6, code="table"),
]


# Many small operators, each checked: searches of pairs of lattice points, trained networks.
SLOW = ("convex-caldera", "caldera", "reallm-vq", "reallm", "reallm-ae")


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def there(found: Tensor) -> Tensor:
    """The values of a tensor that must be on the device."""
    assert isinstance(found, Pretended), f"on {found.device}"
    return found.held


def test_pretended_device_refuses_what_cuda_refuses() -> None:
    with pretended() as device:
        x = gaussian(3, 4).to(device)
        for mixed in (lambda: x + torch.ones(4), lambda: torch.cat([x, torch.ones(1, 4)])):
            with pytest.raises(RuntimeError, match="mixes"):
                mixed()
        with pytest.raises(RuntimeError, match="numpy"):
            x.numpy()
        with pytest.raises(RuntimeError, match="generator"):
            torch.randn(3, device=device, generator=torch.Generator())
        assert torch.equal((2.0 * x + torch.tensor(1.0)).cpu(), 2.0 * x.held + 1.0)
        assert there(torch.zeros(2, device=device)).shape == (2,)


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
@pytest.mark.slow
def test_quantizer_stays_on_its_device(quantizer: Quantizer) -> None:
    shape = SMALL if quantizer.kind == "trellis" else SHAPE
    W, importance = gaussian(*shape), gaussian(shape[1], seed=1).square()
    here = quantizer.fit(W, importance=importance)
    expected = here.decode(here.encode(W))
    with pretended() as device:
        fitted = quantizer.fit(W.to(device), importance=importance.to(device))
        codes = fitted.encode(W.to(device))
        values = there(fitted.decode(codes))
        packed = fitted.pack(codes)
        assert torch.equal(there(fitted.unpack(packed)), there(codes))
        moved = {name: tensor.to(device) for name, tensor in fitted.tensors().items()}
        again = quantizer.restore(shape, moved)
        assert torch.equal(there(again.decode(again.unpack(packed))), values)
        rows = fitted.take_rows(slice(0, shape[0]))
        there(rows.decode(rows.encode(W.to(device))))
    torch.testing.assert_close(values, expected)


def test_every_quantizer_is_tried() -> None:
    in_a_method = {"neural"}  # its values lie within [-1, 1]: reallm-ae puts it in double_scale
    assert {q.kind for q in QUANTIZERS} | in_a_method == set(quantizers.TABLE)


def fitted_on(device: Any, recipe: Any, W: Tensor, X: Tensor) -> Fit:
    W, X = (W, X) if device is None else (W.to(device), X.to(device))
    H = Hessian((X.T @ X / len(X)).double(), statistics={"mean_abs": X.abs().mean(0)})
    return fit_layer(Problem(W, H, "layer"), recipe, seed=0, layer="layer", site="layer")


METHOD_PARAMETERS = [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in METHODS]


@pytest.mark.parametrize("name", METHOD_PARAMETERS)
@pytest.mark.slow
def test_method_fits_and_multiplies_on_its_device(name: str) -> None:
    method = METHODS[name]
    shape = (16, 16) if name == "qtip" else SHAPE
    recipe = method.ladder(shape, Wishes(rank=4, factor_bits=method.factor_bits))[0]
    recipe = replace(recipe, sweeps=1)
    W, X = gaussian(*shape), gaussian(2 * shape[1], shape[1], seed=1)
    x = gaussian(3, shape[1], seed=2)
    expected = fitted_on(None, recipe, W, X)
    with pretended() as device:
        fit = fitted_on(device, recipe, W, X)
        assert fit.relative_loss == pytest.approx(expected.relative_loss, rel=0.02)
        there(fit.layer.decode())
        module = CompressedLinear.from_layer(fit.layer).to(device)
        inputs = x.to(device).requires_grad_()
        y = module(inputs)
        y.sum().backward()
        found, gradient = there(y.detach()), there(inputs.grad)
        plain = there(module.dequantize().weight.detach())
    torch.testing.assert_close(found, x @ plain.T, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(gradient, plain.sum(0).expand(3, -1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("curvature", ["kronecker", "guided"])
def test_two_sided_rounding_stays_on_its_device(curvature: str) -> None:
    W, X, Y = gaussian(*SHAPE), gaussian(96, SHAPE[1], seed=1), gaussian(64, SHAPE[0], seed=2)
    recipe = Recipe((Quantize(E8P(2), "full"),), transforms=(RandomizedHadamard(outputs=False),))

    def fitted(device: Any) -> Fit:
        on = (lambda x: x) if device is None else (lambda x: x.to(device))
        halves = [Hessian(on(x.T @ x / len(x)).double()) for x in X.chunk(2)]
        if curvature == "guided":
            problem = Problem.by_row_groups(on(W), tuple(halves))
        else:
            problem = Problem(on(W), halves[0], "layer", Hessian(on(Y.T @ Y / len(Y)).double()))
        return fit_layer(problem, recipe, seed=0, layer="layer", site="layer")

    expected = fitted(None)
    with pretended() as device:
        found = fitted(device)
        there(found.layer.decode())
    assert found.relative_loss == pytest.approx(expected.relative_loss, rel=0.02)


@pytest.mark.parametrize("diagonal", [False, True])
def test_nuclear_norm_stays_on_its_device(diagonal: bool) -> None:
    A, X = gaussian(24, 16), gaussian(48, 16, seed=1)
    H = X.T @ X / len(X)
    H = H.diagonal() if diagonal else H
    expected = fit_nuclear_norm(A, H, mu=1.0, tol=1e-3)
    with pretended() as device:
        found = fit_nuclear_norm(A.to(device), H.to(device), mu=1.0, tol=1e-3)
        product = there(found.left @ found.right)
    torch.testing.assert_close(product, expected.left @ expected.right, rtol=1e-2, atol=1e-3)
