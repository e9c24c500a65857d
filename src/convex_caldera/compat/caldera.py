"""`caldera(quant_params, W, H, ...)`: the mission's call, carried out by a recipe.

Different from the original: Q, L and R come back in the scale of W (`global_scale` is 1), so
that Q + L @ R is the compressed weight as the examples write it; with `hadamard_transform` they
are in rotated coordinates and `weight()` gives the matrix itself. Nothing passed in is changed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from convex_caldera.compat.caldera_params import CalderaParams
from convex_caldera.core.hessian import Hessian
from convex_caldera.core.problem import Problem
from convex_caldera.core.protocols import Quantizer
from convex_caldera.core.recipe import FactorCoding, FitLowRank, Metric, Quantize, Recipe, Step
from convex_caldera.core.terms import Coded, CompressedLayer, LowRank
from convex_caldera.errors import RecipeError
from convex_caldera.fit.backfit import Fit, fit_layer
from convex_caldera.quantizers.e8p import E8P
from convex_caldera.transforms.hadamard import RandomizedHadamard

LOW_RANK, CODES = "LR", "Q"
DENSE_BITS = 16


@dataclass
class CalderaDecomposition:
    """Q (m, n), L (m, rank), R (rank, n), and what was measured on the way.

    `errors["Q"]` and `errors["LR"]` list sqrt(relative loss) after each half-step of that name;
    `layer` is the stored form.
    """

    Q: Tensor
    L: Tensor
    R: Tensor
    errors: dict[str, list[float]]
    layer: CompressedLayer
    relative_loss: float
    global_scale: float = 1.0

    def weight(self) -> Tensor:
        """The compressed weight in the coordinates of W, float32."""
        return self.layer.decode()


def caldera(
    quant_params: CalderaParams,
    W: Tensor,
    H: Tensor | None = None,
    device: str | torch.device = "cpu",
    use_tqdm: bool = False,
    scale_W: bool = True,
    seed: int = 42,
) -> CalderaDecomposition:
    """Decompose one weight as Q + L R.

    Args:
        quant_params: see `CalderaParams`.
        W: (out_features, in_features).
        H: (in_features, in_features), E[x x^T]; the identity if absent.
        device: where to compute.
        use_tqdm: accepted; a single matrix takes too short a time for a bar.
        scale_W: accepted; quantizers here scale themselves.
        seed: of the rotation.

    Raises:
        RecipeError: parameters that contradict each other.
        NumericalError, ShapeError: of W and H.
    """
    del use_tqdm, scale_W
    recipe, names = recipe_of(quant_params, tuple(W.shape))
    matrix = Hessian.identity(W.shape[1]) if H is None else Hessian(H, recipe.damping)
    problem = Problem(W.detach().to(device).float(), matrix.to(device), "W")
    fit = fit_layer(problem, recipe, seed=seed, layer="W", site="W")
    return _decomposition(fit, names, W)


def recipe_of(params: CalderaParams, shape: tuple[int, ...]) -> tuple[Recipe, list[str]]:
    """The recipe that the parameters describe, and the original name of each step."""
    names = list(params.update_order) or [LOW_RANK, CODES]
    wanted = {CODES: params.compute_quantized_component, LOW_RANK: params.compute_low_rank_factors}
    unknown = sorted(set(names) - set(wanted))
    if unknown:
        raise RecipeError(f"update_order may hold 'Q' and 'LR', got {unknown[0]!r}")
    names = [name for name in names if wanted[name]]
    if not names:
        raise RecipeError("neither a quantized nor a low-rank part is asked for")
    steps: dict[str, Step] = {CODES: _codes(params), LOW_RANK: _low_rank(params, shape)}
    transforms = (RandomizedHadamard(),) if params.hadamard_transform else ()
    return Recipe(
        tuple(steps[name] for name in names),
        transforms,
        sweeps=max(params.iters, 1),
        damping=params.quip_args.sigma_reg,
    ), names


def _codes(params: CalderaParams) -> Quantize:
    aware = params.activation_aware_Q
    if not (aware or params.lattice_quant_Q):
        return Quantize(params.quant_factory_Q.get_quantizer(params.Q_bits), "identity")
    scale = params.quip_args.scale_override
    return Quantize(
        E8P(params.Q_bits),
        "full" if aware else "identity",
        sweeps=params.quip_args.quip_tune_iters if aware else 0,
        downdate=params.Q_hessian_downdate,
        gains=(1.03 / scale,) if scale > 0 else (1.0,),
    )


def _low_rank(params: CalderaParams, shape: tuple[int, ...]) -> FitLowRank:
    bits = {params.L_bits, params.R_bits}
    dense = min(bits) >= DENSE_BITS
    if not dense and len(bits) > 1:
        raise RecipeError(
            f"L_bits and R_bits must be equal, got {params.L_bits} and {params.R_bits}"
        )
    coding = None if dense else FactorCoding(_factor_quantizer(params), max(params.lplr_iters, 1))
    metric: Metric = "full" if params.activation_aware_LR else "identity"
    return FitLowRank(min(params.rank, *shape), metric, coding)


def _factor_quantizer(params: CalderaParams) -> Quantizer:
    if params.lattice_quant_LR:
        return E8P(params.L_bits)
    return params.quant_factory_LR.get_quantizer(params.L_bits)


def _decomposition(fit: Fit, names: list[str], W: Tensor) -> CalderaDecomposition:
    m, n = W.shape
    Q, L, R = torch.zeros(m, n), torch.zeros(m, 0), torch.zeros(0, n)
    for term in fit.layer.terms:
        match term:
            case Coded():
                Q = term.decode()
            case LowRank():
                L, R = term.left_matrix(), term.right_matrix()
    errors: dict[str, list[float]] = {name: [] for name in names}
    for half_step in fit.trace:
        errors[names[half_step.step]].append(half_step.relative_loss**0.5)
    return CalderaDecomposition(Q, L, R, errors, fit.layer, fit.relative_loss)
