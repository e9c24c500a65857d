"""The source-coding methods keep what they promise to a plan, and refuse what cannot be."""

from __future__ import annotations

import pytest
import torch

from convex_caldera.coding import Huffman, Rans
from convex_caldera.core.hessian import Hessian
from convex_caldera.core.problem import Problem
from convex_caldera.core.recipe import FactorCoding, Quantize, Recipe
from convex_caldera.errors import RecipeError
from convex_caldera.fit.backfit import fit_layer
from convex_caldera.quantizers import ECSQ, LloydMax
from convex_caldera.recipes.ladder import Wishes
from convex_caldera.recipes.scl import ecsq_recipe, ecvq_recipe, entropy_coded
from convex_caldera.recipes.table import METHODS
from convex_caldera.storage.codec import layer_to_tensors, recipe_layout
from convex_caldera.workflow.planning import layer_bytes
from tests.examples import first

SHAPE = (96, 64)


def problem(seed: int = 0, tails: int = 3) -> Problem:
    random = torch.Generator().manual_seed(seed)
    W = torch.randn(SHAPE, generator=random) ** tails
    x = torch.randn(400, SHAPE[1], generator=random) * torch.logspace(-1, 1, SHAPE[1])
    return Problem(W, Hessian(x.T @ x / len(x)), "layer")


@pytest.mark.parametrize("seed", first(1, range(3)))
@pytest.mark.parametrize(
    "recipe",
    [ecsq_recipe(0.5), ecsq_recipe(2.0), ecsq_recipe(4.0), ecvq_recipe(1.0)]
    + [Recipe((Quantize(ECSQ(2.0), "full", sweeps=1, coder=Huffman(5)),))],
    ids=str,
)
def test_rates_hold_under_feedback_and_any_coder(recipe: Recipe, seed: int) -> None:
    """Feedback adds its own errors to what is rounded; the promise in bytes is kept."""
    layer = fit_layer(problem(seed), recipe, seed=0, layer="l", site="s").layer
    _, tensors = layer_to_tensors(layer)
    stored = sum(t.numel() * t.element_size() for t in tensors.values())
    assert stored <= layer_bytes(recipe, SHAPE)
    assert stored > 0.8 * layer_bytes(recipe, SHAPE) or "Huffman" in str(recipe)


def test_feedback_and_free_rates_lower_the_loss_at_equal_bytes() -> None:
    fixed = Recipe((Quantize(LloydMax(3), "full"),))
    free = ecsq_recipe(3.0)
    losses = [
        fit_layer(problem(tails=1), r, seed=0, layer="l", site="s").relative_loss
        for r in (fixed, free)
    ]
    assert losses[1] < losses[0]


def test_coders_are_added_to_any_recipe() -> None:
    for name in ("gptq", "quip-sharp", "nf4", "lqer"):
        recipe = METHODS[name].ladder(SHAPE, Wishes())[0]
        coded = entropy_coded(recipe, "huffman")
        (step,) = [s for s in coded.steps if isinstance(s, Quantize)]
        assert isinstance(step.coder, Huffman)
        assert recipe_layout(coded, SHAPE) == recipe_layout(recipe, SHAPE)


def test_rate_limited_quantizers_need_a_coder() -> None:
    with pytest.raises(RecipeError, match="needs a coder"):
        Quantize(ECSQ(2.0), "full")
    with pytest.raises(RecipeError, match="no entropy coder"):
        FactorCoding(ECSQ(2.0))
    assert Quantize(ECSQ(2.0), coder=Rans(5)).coder == Rans(5)


def test_a_code_width_leaves_one_rung() -> None:
    for name, wishes in {
        "scl-scalar-uniform": Wishes(code_bits=8, clip_ratio=0.99),
        "scl-lloyd-max": Wishes(code_bits=4, num_iters=25, sample_size=1000),
        "scl-vector-vq": Wishes(code_bits=8, block_size=4),
    }.items():
        (recipe,) = METHODS[name].ladder(SHAPE, wishes)
        assert recipe in METHODS[name].ladder(SHAPE, wishes)
    (vq,) = METHODS["scl-vector-vq"].ladder(SHAPE, Wishes(code_bits=8))
    assert vq.steps[0].quantizer.bits == 2.0  # type: ignore[union-attr]


def test_codebooks_larger_than_the_matrix_are_refused() -> None:
    for name, wishes in {
        "scl-lloyd-max": Wishes(code_bits=8),
        "scl-vector-vq": Wishes(code_bits=8, block_size=4),
    }.items():
        with pytest.raises(RecipeError, match=r"256 entries .* larger .* choose fewer"):
            METHODS[name].ladder((4, 8), wishes)
    with pytest.raises(RecipeError, match="another block size"):
        METHODS["scl-vector-vq"].ladder(SHAPE, Wishes(bits=3, block_size=8))
    with pytest.raises(RecipeError, match=r"blocks of 4 .* 6 bits"):
        METHODS["scl-ecvq"].ladder(SHAPE, Wishes(bits=6, block_size=4))


def test_ecvq_offers_blocks_of_two_as_far_as_they_go() -> None:
    ladder = METHODS["scl-ecvq"].ladder((1024, 1024), Wishes())
    offered = [recipe.steps[0].quantizer for recipe in ladder]  # type: ignore[union-attr]
    assert [quantizer.bits for quantizer in offered] == [k / 8 for k in range(4, 49)]
    assert all(quantizer.dim == (2 if quantizer.bits <= 3 else 1) for quantizer in offered)
    sizes = [layer_bytes(recipe, (1024, 1024)) for recipe in ladder]
    assert sizes == sorted(sizes)


def test_vector_ladders_rise_and_keep_codebooks_small() -> None:
    ladder = METHODS["scl-vector-vq"].ladder((1024, 1024), Wishes())
    sizes = [layer_bytes(recipe, (1024, 1024)) for recipe in ladder]
    assert sizes == sorted(sizes) and len(set(sizes)) == len(sizes)
    for recipe in ladder:
        quantizer = recipe.steps[0].quantizer  # type: ignore[union-attr]
        book = 2 * quantizer.num_codewords * quantizer.dim
        assert quantizer.dim == 1 or book <= 0.02 * quantizer.bits * 1024 * 1024 / 8
