"""T10: a named recipe is the hand-built composition, and what it promises shows in its loss."""

from __future__ import annotations

import pytest

from convex_caldera.coding import Rans
from convex_caldera.core.problem import Problem
from convex_caldera.core.recipe import FactorCoding, FitLowRank, Quantize, Recipe
from convex_caldera.errors import RecipeError
from convex_caldera.fit.backfit import fit_layer
from convex_caldera.quantizers.clipped_uniform import ClippedUniform
from convex_caldera.quantizers.double_scale import DoubleScale
from convex_caldera.quantizers.e8p import E8P
from convex_caldera.quantizers.ecsq import ECSQ
from convex_caldera.quantizers.ecvq import ECVQ
from convex_caldera.quantizers.kmeans import KMeans
from convex_caldera.quantizers.lloyd_max import LloydMax
from convex_caldera.quantizers.mxint import MXInt
from convex_caldera.quantizers.neural import Neural
from convex_caldera.quantizers.normal_float import NormalFloat
from convex_caldera.quantizers.strip_order import StripOrder
from convex_caldera.quantizers.trellis import Trellis
from convex_caldera.quantizers.uniform import Uniform
from convex_caldera.recipes.adaptive import reallm_menu
from convex_caldera.recipes.autoencoder import reallm_ae_recipe
from convex_caldera.recipes.convex import convex_caldera_recipe, menu_ranks, rates, trellis_recipe
from convex_caldera.recipes.ladder import Wishes
from convex_caldera.recipes.lattice import caldera_recipe, quip_sharp_recipe
from convex_caldera.recipes.lqer import (
    l2qer_recipe,
    lqer_recipe,
    no_lqer_recipe,
    qera_approx_recipe,
    qera_exact_recipe,
)
from convex_caldera.recipes.reallm import reallm_vq_recipe
from convex_caldera.recipes.records import from_record, from_toml, recipe_hash, to_record, to_toml
from convex_caldera.recipes.scalar import normal_float_recipe, uniform_recipe
from convex_caldera.recipes.scl import (
    ecsq_recipe,
    ecvq_recipe,
    lloyd_max_recipe,
    scalar_uniform_recipe,
    vector_vq_recipe,
)
from convex_caldera.recipes.table import METHODS, method
from convex_caldera.storage.codec import recipe_layout
from convex_caldera.transforms.hadamard import RandomizedHadamard
from tests.problems import acceptance_case

MXINT4, MXINT8 = MXInt(4, 16), MXInt(8, 32)


def error_reconstruction(metric: str) -> Recipe:
    factors = FactorCoding(MXINT8, iterations=1, feedback=False)
    return Recipe((Quantize(MXINT4, "identity"), FitLowRank(8, metric, factors)), damping=0.0)


ROTATED = (RandomizedHadamard(),)
SHAPES = [(48, 48), (24, 48), (112, 48), (48, 112), (96, 288), (288, 96)]

HAND_BUILT = {
    "rtn": (
        uniform_recipe(3, 64, "identity"),
        Recipe((Quantize(Uniform(3, group_size=64), "identity"),)),
    ),
    "gptq": (uniform_recipe(3, 64), Recipe((Quantize(Uniform(3, group_size=64), "full"),))),
    "nf4": (
        normal_float_recipe(4, 64),
        Recipe((Quantize(NormalFloat(4, group_size=64), "identity"),)),
    ),
    "quip-sharp": (
        quip_sharp_recipe(2),
        Recipe((Quantize(E8P(2), "full", sweeps=2),), transforms=ROTATED),
    ),
    "qtip": (
        trellis_recipe(2.5),
        Recipe((Quantize(Trellis(2.5, 12), "full"),), transforms=ROTATED),
    ),
    "caldera": (
        caldera_recipe(2, rank=16, factor_bits=4),
        Recipe(
            (
                FitLowRank(16, "full", FactorCoding(E8P(4))),
                Quantize(E8P(2), "full", sweeps=2, downdate=True),
            ),
            transforms=ROTATED,
            sweeps=6,
        ),
    ),
    "scl-scalar-uniform": (
        scalar_uniform_recipe(8),
        Recipe((Quantize(ClippedUniform(8), "diagonal"),)),
    ),
    "scl-lloyd-max": (
        lloyd_max_recipe(4, 0),
        Recipe((Quantize(LloydMax(4, 0), "diagonal"),)),
    ),
    "scl-vector-vq": (
        vector_vq_recipe(),
        Recipe((Quantize(KMeans(2.0, dim=4), "diagonal"),)),
    ),
    "scl-ecsq": (ecsq_recipe(2.5), Recipe((Quantize(ECSQ(2.5), "full", coder=Rans(6)),))),
    "scl-ecvq": (ecvq_recipe(1.5), Recipe((Quantize(ECVQ(1.5, 2), "full", coder=Rans(5)),))),
    "no-lqer": (
        no_lqer_recipe(MXINT4),
        Recipe((Quantize(MXINT4, "identity"),), damping=0.0),
    ),
    "lqer": (lqer_recipe(MXINT4, 8), error_reconstruction("identity")),
    "l2qer": (l2qer_recipe(MXINT4, 8), error_reconstruction("mean_abs")),
    "qera-approx": (qera_approx_recipe(MXINT4, 8), error_reconstruction("diagonal")),
    "qera-exact": (qera_exact_recipe(MXINT4, 8), error_reconstruction("full")),
    "reallm-vq": (
        reallm_vq_recipe(2, rank=8, bucket=4, factor_bits=16),
        Recipe(
            (
                FitLowRank(8, "full"),
                Quantize(DoubleScale(KMeans(2, 4, -1, iterations=20), 64), "full", sweeps=2),
            ),
            sweeps=3,
        ),
    ),
    "reallm": (
        reallm_menu((48, 96), Wishes(), 3.0)["strip 2"],
        Recipe(
            (Quantize(StripOrder(DoubleScale(KMeans(2, 2, -1, iterations=20), 64)), "diagonal"),)
        ),
    ),
    "reallm-ae": (
        reallm_ae_recipe(Neural(embed_bits=3), rank=4),
        Recipe(
            (
                FitLowRank(4, "full", FactorCoding(E8P(4))),
                Quantize(DoubleScale(Neural(embed_bits=3), 64), "diagonal", coder=Rans(3)),
            ),
            sweeps=2,
        ),
    ),
    "convex-caldera": (
        convex_caldera_recipe(2.5, rank=4),
        Recipe(
            (
                FitLowRank(4, "identity", FactorCoding(Trellis(2.0, 12), 2)),
                Quantize(Trellis(2.5, 12), "full"),
            ),
            transforms=ROTATED,
        ),
    ),
}


def test_every_method_is_built_by_hand_here() -> None:
    assert set(HAND_BUILT) == set(METHODS)


@pytest.mark.parametrize("name", HAND_BUILT)
def test_named_recipe_is_its_composition(name: str) -> None:
    named, composed = HAND_BUILT[name]
    assert named == composed
    assert recipe_hash(named) == recipe_hash(composed)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_rung_reads_itself_back_and_can_be_stored(name: str, shape: tuple[int, int]) -> None:
    ladder = METHODS[name].ladder(shape, Wishes())
    assert len(ladder) == len(set(ladder)) >= 3
    for recipe in ladder[:: max(1, len(ladder) // 9)]:
        record = to_record(recipe)
        assert from_record(record) == recipe
        assert from_record(from_toml(to_toml(record))) == recipe
        _, layout = recipe_layout(recipe, shape)
        assert layout


@pytest.mark.parametrize("name", METHODS)
def test_wishes_narrow_a_ladder(name: str) -> None:
    """Pinned bits leave rungs of those bits only."""
    pinned = METHODS[name].ladder((48, 112), Wishes(bits=3))
    assert pinned and set(pinned) <= set(METHODS[name].ladder((48, 112), Wishes()))
    for recipe in pinned:
        (bits,) = [step.quantizer.bits for step in recipe.steps if isinstance(step, Quantize)]
        assert bits == 3


def test_rank_zero_is_the_method_without_low_rank() -> None:
    assert caldera_recipe(3, rank=0) == quip_sharp_recipe(3)
    assert convex_caldera_recipe(3.0, rank=0) == trellis_recipe(3.0)
    assert convex_caldera_recipe(3.0, rank=2).rank == 2


def test_ranks_never_exceed_the_matrix() -> None:
    for name in ("caldera", "convex-caldera"):
        for recipe in METHODS[name].ladder((24, 48), Wishes(rank=1000)):
            assert recipe.rank == 24
    for shape in SHAPES:
        assert menu_ranks(shape)[0] == 0 and max(menu_ranks(shape)) <= min(shape)


def test_rates_are_sixteenths() -> None:
    assert rates()[0] == 1 and rates()[-1] == 8 and len(rates()) == 113
    assert all((16 * rate).is_integer() for rate in rates())


def test_unknown_methods_offer_the_nearest() -> None:
    with pytest.raises(RecipeError, match="did you mean caldera"):
        method("kaldera")
    with pytest.raises(RecipeError, match="convex-caldera methods"):
        method("")
    for name, entry in METHODS.items():
        assert method(name) is entry and entry.name == name
        assert entry.sentence.endswith(".") and entry.paper


@pytest.mark.slow
def test_losses_are_in_the_order_of_the_papers() -> None:
    """At about two bits on the acceptance case; each step of the ladder buys something."""
    W, hessian = acceptance_case()
    problem = Problem(W.float(), hessian, "acceptance")

    def loss(recipe: Recipe) -> float:
        return fit_layer(problem, recipe, seed=0, layer="layer", site="site").relative_loss

    rtn, gptq = loss(uniform_recipe(2, 0, "identity")), loss(uniform_recipe(2, 0, "full"))
    lattice, low_rank = loss(quip_sharp_recipe(2)), loss(caldera_recipe(2, rank=16, sweeps=2))
    trellis = loss(trellis_recipe(2.0))
    assert low_rank < trellis < lattice < gptq < rtn
