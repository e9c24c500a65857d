"""ReALLM: distortions of the literature, honest bits, options, shared decoders, menus."""

from __future__ import annotations

import itertools

import pytest
import torch

from convex_caldera.coding.symbols import symbol_bits
from convex_caldera.core.hessian import Hessian
from convex_caldera.core.problem import Problem
from convex_caldera.core.protocols import Quantizer
from convex_caldera.core.recipe import Quantize, Recipe
from convex_caldera.errors import RecipeError
from convex_caldera.fit.backfit import fit_layer
from convex_caldera.quantizers import DoubleScale, KMeans, Neural, NormalFloat, StripOrder
from convex_caldera.recipes.adaptive import reallm_menu
from convex_caldera.recipes.autoencoder import (
    core_of,
    parse_options,
    reallm_ae_ladder,
    reallm_ae_recipe,
    share_decoders,
)
from convex_caldera.recipes.ladder import Wishes
from convex_caldera.recipes.reallm import BUCKETS, reallm_vq_ladder, reallm_vq_recipe
from convex_caldera.storage.codec import recipe_layout
from tests.examples import first
from tests.problems import correlated_hessian, gaussian

LARGE = (4096, 4096)


def stored_bits(recipe: Recipe, shape: tuple[int, int]) -> float:
    """Bits per weight of all tensors, before file headers."""
    _, layout = recipe_layout(recipe, shape)
    total = sum(dtype.itemsize * torch.Size(size).numel() for dtype, size in layout.values())
    return 8 * total / (shape[0] * shape[1])


@pytest.mark.parametrize(
    ("inner", "published"),
    first(
        3,
        [
            (NormalFloat(2, -1), 0.305),
            (KMeans(2, 1, -1), 0.1134),
            (KMeans(2, 2, -1), 0.1057),
            (KMeans(2, 4, -1), 0.0935),
            (KMeans(3, 2, -1), 0.0270),
        ],
    ),
    ids=str,
)
def test_distortions_are_those_of_the_literature(inner: Quantizer, published: float) -> None:
    """Relative errors of Gaussian weights over the largest of 64, within 3 %."""
    W = torch.randn(384, 512, generator=torch.Generator().manual_seed(0))
    fitted = DoubleScale(inner).fit(W)
    V = fitted.quantizer.divided(W)
    error = fitted.inner.decode(fitted.inner.encode(V)) - V
    found = float(error.square().sum() / V.square().sum())
    assert found == pytest.approx(published, rel=0.03)


def test_the_papers_two_bits_are_2_88() -> None:
    """Pairs of 2 bits, 16-bit orders of strips, rank 64 in 16 bits, at 4096 x 4096."""
    from convex_caldera.compat.reallm import ReALLMArguments

    paper = ReALLMArguments(lora_model_name="nf2", lora_num_ranks=64).recipe()
    assert stored_bits(paper, LARGE) == pytest.approx(2.877, abs=0.001)
    assert paper.rank == 64 and paper.steps[0].factors is None  # type: ignore[union-attr]
    ours = reallm_vq_recipe(2, 64, order="strip", factor_bits=16)
    assert stored_bits(ours, LARGE) == pytest.approx(2.8145, abs=0.001)
    coded = reallm_vq_recipe(2, 64)
    assert stored_bits(coded, LARGE) == pytest.approx(2.252, abs=0.001)


@pytest.mark.parametrize("bucket", BUCKETS)
def test_a_bucket_has_rates_in_steps_of_its_length(bucket: int) -> None:
    ladder = reallm_vq_ladder((96, 128), Wishes(rank=0, bucket=bucket))
    bits = [step.quantizer.bits for recipe in ladder for step in recipe.steps]  # type: ignore[union-attr]
    assert bits[0] == 1 and {b * bucket % 1 for b in bits} == {0.0}
    assert min(b - a for a, b in itertools.pairwise(bits)) == 1 / bucket


def test_low_rank_and_feedback_each_lower_the_loss() -> None:
    W = (
        gaussian(64, 96, dtype=torch.float32)
        + gaussian(64, 3, 1).float() @ gaussian(3, 96, 2).float()
    )
    problem = Problem(W, correlated_hessian(96))

    def loss(recipe: Recipe) -> float:
        return fit_layer(problem, recipe, seed=0, layer="W", site="x").relative_loss

    plain = loss(reallm_vq_recipe(2, 0, metric="identity"))
    fed_back, low_rank = loss(reallm_vq_recipe(2, 0)), loss(reallm_vq_recipe(2, 3))
    assert low_rank < fed_back < plain
    assert loss(reallm_vq_recipe(2, 0, latent="nf")) > fed_back


def test_the_best_state_is_kept() -> None:
    problem = Problem(gaussian(32, 64, dtype=torch.float32), Hessian.identity(64))
    fit = fit_layer(problem, reallm_vq_recipe(2, 4), seed=0, layer="W", site="x")
    complete = [step.relative_loss for step in fit.trace[1:]]
    assert fit.relative_loss == pytest.approx(min(complete), rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bucket": 3}, "bucket is one of 1, 2, 4, 8"),
        ({"latent": "ae"}, "latent is one of vq, nf"),
        ({"order": "random"}, "order is one of none, strip"),
        ({"bits": 5, "latent": "nf"}, "2, 3 or 4 bits"),
        ({"bits": 2.25}, "whole number"),
        ({"bits": 8, "bucket": 8}, "whole number"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        reallm_vq_recipe(**options)


def test_normal_float_has_no_buckets() -> None:
    with pytest.raises(RecipeError, match="leave out bucket"):
        reallm_vq_ladder((96, 128), Wishes(latent="nf", bucket=2))


def test_symbols_are_those_of_the_innermost_codes() -> None:
    assert symbol_bits(StripOrder(DoubleScale(KMeans(1.5, 2, -1)))) == 3
    assert symbol_bits(DoubleScale(Neural(embed_bits=5))) == 5
    assert symbol_bits(DoubleScale(NormalFloat(4, -1))) == 4


# --- autoencoders ---------------------------------------------------------------------------


def test_options_of_the_mission_mean_what_they_meant() -> None:
    """One 4096 x 4096 matrix: 64 frames of 512, 16 x 16 x 16 embeddings, 7.2 million in all."""
    options = parse_options(
        (
            "p_size=512", "conv_type=['convnext', 'quantpshuffle']", "enc_dim=64_16",
            "enc_strds=[2,2,2,2,2]", "dec_strds=2,2,2,2,2", "modelsize=7.2", "ks=0_1_5",
            "lower_width=12",
        )
    )  # fmt: skip
    neural = options.neural(LARGE, 6)
    assert neural.patches(LARGE) == 64 and neural.encoder_width == 64
    assert 64 * neural.geometry.embedding == 262_144
    widths = [layer.inputs for layer in neural.geometry.layers]
    assert [layer.kernel for layer in neural.geometry.layers] == [1, 1, 3, 5, 5, 5, 3]
    total = neural.geometry.weights + neural.geometry.outputs + 262_144
    assert 7_100_000 < total <= 7_200_000
    assert neural.width == pytest.approx(248, rel=0.02)
    assert widths[2:] == pytest.approx([207, 172, 143, 119, 99], rel=0.03)
    share = parse_options(("modelsize=0.3", "enc_dim=8_0.5"))
    assert share.neural((512, 512), 4).channels == 150_000 // 256**2 == 2


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("enc_dims=64_16", "did you mean enc_dim"),
        ("enc_dim", "must read name=value"),
        ("enc_dim=64", "enc_dim reads"),
        ("enc_strds=2,x", "is no tuple"),
        ("epochs=many", "is no int"),
        ("ks=1_3", "ks reads"),
        ("p_size=33", "no multiple"),
        ("modelsize=0.000001", "raise modelsize"),
        ("modelsize=-1", "positive"),
        ("enc_dim=8_0.5", "modelsize, which is not given"),
        ("conv_type=convnext,pshuffel", "quantpshuffle"),
        ("share=some", "all, kind, none"),
        ("wbits=16", "2 to 8 bits"),
    ],
)
def test_bad_autoencoder_options_are_refused(option: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_options((option,)).neural((64, 64), 4)


def test_an_option_is_given_once() -> None:
    with pytest.raises(RecipeError, match="each name once"):
        parse_options(("epochs=1", "epochs=2"))
    with pytest.raises(RecipeError, match="1 to 8 bits"):
        reallm_ae_ladder((48, 48), Wishes(bits=9))


def test_layers_share_a_decoder_as_told() -> None:
    recipes = {
        f"{block}.{kind}": reallm_ae_recipe(Neural(embed_bits=bits))
        for block, bits in ((0, 2), (1, 3))
        for kind in ("q_proj", "k_proj")
    }
    recipes["1.up_proj"] = reallm_ae_recipe(Neural(width=20))
    homes = {
        share: {n: core_of(r).home for n, r in share_decoders(recipes, (f"share={share}",)).items()}
        for share in ("all", "kind", "none")
    }
    first = "0.q_proj"
    assert homes["all"] == {
        first: "", "0.k_proj": first, "1.q_proj": first, "1.k_proj": first, "1.up_proj": "",
    }  # fmt: skip
    assert homes["kind"]["1.q_proj"] == first and homes["kind"]["1.k_proj"] == "0.k_proj"
    assert set(homes["none"].values()) == {""}
    shared = share_decoders(recipes, ())
    assert (
        stored_bits(shared["1.q_proj"], (64, 64)) < stored_bits(recipes["1.q_proj"], (64, 64)) - 2
    )


# --- the menu -------------------------------------------------------------------------------


def test_a_menu_is_near_its_target_and_has_every_latent() -> None:
    menu = reallm_menu((288, 288), Wishes(), 2.6)
    assert {"vq 1", "vq 2", "vq 2.5", "strip 2", "nf 2", "nf 3", "ae 2", "ae half 2"} <= set(menu)
    assert "vq 4" not in menu and "ae 7" not in menu
    for label, recipe in menu.items():
        (codes,) = [step for step in recipe.steps if isinstance(step, Quantize)]
        assert codes.coder is None, label
        assert codes.quantizer.bits == float(label.split()[-1])  # type: ignore[attr-defined]
        ordered = isinstance(codes.quantizer, StripOrder)
        assert ordered == label.startswith("strip")
    assert all(recipe.rank == 8 for recipe in reallm_menu((288, 288), Wishes(rank=8), 2.6).values())
    assert set(reallm_menu((288, 288), Wishes(bits=3), 2.6)) == {
        "vq 3",
        "nf 3",
        "ae 3",
        "ae half 3",
    }
