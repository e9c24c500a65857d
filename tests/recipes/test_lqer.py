"""The LQER family: identities of error reconstruction, the order of its metrics, honest bits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from convex_caldera.core.hessian import Hessian
from convex_caldera.core.problem import Problem
from convex_caldera.core.protocols import Quantizer
from convex_caldera.core.terms import Coded, LowRank
from convex_caldera.errors import NumericalError, RecipeError
from convex_caldera.fit.backfit import Fit, fit_layer
from convex_caldera.fit.low_rank import fit_low_rank
from convex_caldera.quantizers import Minifloat, MXInt, NormalFloat, Uniform
from convex_caldera.recipes.formats import factor_quantizer, format_name, parse_format
from convex_caldera.recipes.ladder import Wishes
from convex_caldera.recipes.lqer import (
    l2qer_recipe,
    lqer_recipe,
    no_lqer_recipe,
    qera_approx_recipe,
    qera_exact_ladder,
    qera_exact_recipe,
)
from convex_caldera.storage.codec import recipe_layout
from tests.examples import first

RECIPES = {
    "lqer": lqer_recipe,
    "l2qer": l2qer_recipe,
    "qera-approx": qera_approx_recipe,
    "qera-exact": qera_exact_recipe,
}
FORMATS: list[Quantizer] = [
    MXInt(3, 16),
    MXInt(4, 16, exponent_rule="legacy"),
    Uniform(3, 16),
    Uniform(3, 16, symmetric=True),
    NormalFloat(3, 16),
    Minifloat(4, 2, 16),
]


def case(m: int = 40, n: int = 56, seed: int = 0, *, dead: int = 0) -> tuple[Tensor, Hessian]:
    """A weight and inputs whose channels are correlated and of very different size."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(m, n, generator=generator)
    mix = torch.randn(n, n, generator=generator, dtype=torch.float64) / math.sqrt(n)
    X = torch.randn(4 * n, n, generator=generator, dtype=torch.float64)
    X = (X + 2 * X @ mix) * torch.logspace(-1, 1, n, dtype=torch.float64)
    X[:, :dead] = 0
    return W, Hessian(X.T @ X / len(X), 0.0, "x", {"mean_abs": X.abs().mean(0)})


def fitted(recipe, W: Tensor, hessian: Hessian) -> Fit:
    return fit_layer(Problem(W, hessian), recipe, seed=0, layer="W", site="x")


@given(st.integers(0, 10**6), st.floats(1e-3, 1e3), st.sampled_from(["diagonal", "full"]))
def test_scaling_the_metric_changes_nothing(seed: int, factor: float, metric: str) -> None:
    """So the normalisation in LQER's code, sqrt(min max), is without effect."""
    W, hessian = case(12, 16, seed)
    E, H = W.double(), hessian.matrix if metric == "full" else hessian.matrix.diagonal()
    one, other = (torch.matmul(*fit_low_rank(E, h, 3)) for h in (H, factor * H))
    assert torch.allclose(one, other, atol=1e-7 * float(E.norm()))


@given(st.integers(0, 10**6), st.integers(0, 12))
def test_the_error_left_is_that_of_eckart_and_young(seed: int, rank: int) -> None:
    """|S (E - C)|^2 = sum of the squared singular values of S E that were dropped."""
    W, hessian = case(12, 16, seed)
    E = W.double()
    left, right = fit_low_rank(E, hessian.matrix, rank)
    rest = E - left @ right
    values = torch.linalg.svdvals(E @ torch.linalg.cholesky(hessian.matrix))
    expected = values[rank:].square().sum().item()
    assert (rest @ hessian.matrix * rest).sum().item() == pytest.approx(
        expected, rel=1e-6, abs=1e-9 * values.square().sum().item()
    )


@given(st.integers(0, 10**6))
def test_exact_is_qera_s_formula_with_the_symmetric_root(seed: int) -> None:
    """S^-1 SVD_k(S E) for S = H^(1/2), which the library never forms."""
    W, hessian = case(12, 16, seed)
    E = W.double()
    energies, basis = torch.linalg.eigh(hessian.matrix)
    S = basis * energies.sqrt() @ basis.T
    U, values, Vh = torch.linalg.svd(S @ E.T, full_matrices=False)
    published = torch.linalg.solve(S, U[:, :3]) @ torch.diag(values[:3]) @ Vh[:3]
    left, right = fit_low_rank(E, hessian.matrix, 3)
    assert torch.allclose((left @ right).T, published, atol=1e-6 * float(E.norm()))


@pytest.mark.parametrize("quantizer", first(2, FORMATS), ids=str)
@pytest.mark.parametrize("factors", [None, MXInt(8, 32)], ids=["float16", "mxint8"])
def test_exact_has_the_least_output_error(quantizer: Quantizer, factors) -> None:
    for seed in range(3):
        W, hessian = case(seed=seed)
        losses = {n: fitted(r(quantizer, 6, factors), W, hessian).loss for n, r in RECIPES.items()}
        plain = fitted(no_lqer_recipe(quantizer), W, hessian).loss
        assert losses["qera-exact"] <= min(losses.values()) * (1 + 1e-3)
        assert losses["qera-exact"] < losses["qera-approx"] < losses["lqer"] < plain
        assert losses["l2qer"] < losses["lqer"]


def test_the_codes_do_not_depend_on_the_metric() -> None:
    W, hessian = case()
    layers = [fitted(r(MXInt(4, 16), 6), W, hessian).layer for r in RECIPES.values()]
    codes = [layer.terms[0] for layer in layers]
    assert all(isinstance(term, Coded) for term in codes)
    assert all(torch.equal(term.codes, codes[0].codes) for term in codes)
    for layer in layers:
        assert isinstance(layer.terms[1], LowRank) and layer.rank == 6


@pytest.mark.parametrize("name", RECIPES)
def test_channels_that_are_always_zero_are_no_obstacle(name: str) -> None:
    W, hessian = case(dead=9)
    plain = fitted(no_lqer_recipe(MXInt(3, 16)), W, hessian)
    low_rank = fitted(RECIPES[name](MXInt(3, 16), 6), W, hessian)
    assert torch.isfinite(low_rank.layer.decode()).all()
    assert low_rank.loss < plain.loss and low_rank.dead_channels == 9


@pytest.mark.parametrize("name", RECIPES)
def test_inputs_and_weights_of_zero_stay_zero(name: str) -> None:
    W, hessian = case()
    nothing = Hessian(torch.zeros(56, 56), 0.0, "x", {"mean_abs": torch.zeros(56)})
    assert torch.isfinite(fitted(RECIPES[name](MXInt(4, 16), 3), W, nothing).layer.decode()).all()
    zero = fitted(RECIPES[name](MXInt(4, 16), 3), torch.zeros_like(W), hessian)
    assert not zero.layer.decode().any()
    constant = fitted(RECIPES[name](MXInt(4, 16), 1), torch.full_like(W, 0.3), hessian)
    assert constant.relative_loss < 1e-3


def test_nan_is_refused_with_its_place() -> None:
    W, hessian = case()
    W[3, 5] = torch.nan
    with pytest.raises(NumericalError, match=r"\[3, 5\]"):
        fitted(lqer_recipe(MXInt(4, 16), 3), W, hessian)


def test_l2qer_without_its_statistic_says_so() -> None:
    W, hessian = case()
    with pytest.raises(RecipeError, match="mean_abs"):
        fitted(l2qer_recipe(MXInt(4, 16), 3), W, Hessian(hessian.matrix, 0.0))


def stored_bits(recipe, shapes: list[tuple[int, int]]) -> float:
    layouts = [recipe_layout(recipe, shape)[1] for shape in shapes]
    size = sum(math.prod(s) * d.itemsize for layout in layouts for d, s in layout.values())
    return 8 * size / sum(m * n for m, n in shapes)


def test_average_bits_of_llama_2_7b_are_honest() -> None:
    """Per original weight: 4.605 with 8-bit exponents, 4.352 with 4-bit ones; published less."""
    shapes = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    wide = l2qer_recipe(MXInt(4, 16), 32, MXInt(8, 16))
    short = l2qer_recipe(MXInt(4, 16, 4), 32, MXInt(8, 16, 4))
    assert stored_bits(wide, shapes) == pytest.approx(4.605, abs=5e-4)
    assert stored_bits(short, shapes) == pytest.approx(4.352, abs=5e-4)
    assert stored_bits(wide, [(4096, 4096)]) == pytest.approx(4.633, abs=5e-4)


@pytest.mark.parametrize(
    "text",
    ["mxint4/16", "mxint4e4/16", "mxint2-legacy/32", "int4/128", "sint8/0", "nf4/64", "e2m1/32"],
)
def test_formats_read_their_own_name(text: str) -> None:
    assert format_name(parse_format(text).quantizer()) == text


@pytest.mark.parametrize("text", ["", "mxint1", "mxint44", "int4e4", "fp4", "e0m3", "nf4-legacy"])
def test_unknown_formats_are_refused(text: str) -> None:
    with pytest.raises(RecipeError):
        parse_format(text).quantizer()


def test_a_fixed_format_leaves_one_rung() -> None:
    wishes = Wishes(rank=5, format="mxint3/16", factor_format="int8/32")
    (recipe,) = qera_exact_ladder((40, 56), wishes)
    assert recipe == qera_exact_recipe(MXInt(3, 16), 5, Uniform(8, 32))
    assert factor_quantizer("float16") is None
