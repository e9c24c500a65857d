"""The one driver: every step refits its term to what the other terms leave over.

This is backfitting, or alternating minimisation. It is not monotone once a term is rounded, so
the state after every half-step is a candidate as soon as each step has run once, and the best
under the undamped H is kept (with the down-date the best state is usually "new low-rank term,
previous codes"). The trace records every half-step.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from convex_caldera.core.hessian import Hessian
from convex_caldera.core.problem import Problem
from convex_caldera.core.protocols import FittedQuantizer, FittedTransform, RateLimited, Widens
from convex_caldera.core.recipe import FitLowRank, Quantize, Recipe, Step
from convex_caldera.core.terms import Coded, CompressedLayer, Dense, LowRank, Term
from convex_caldera.errors import NumericalError, RecipeError
from convex_caldera.fit.coded_factors import fit_coded_factors
from convex_caldera.fit.low_rank import fit_low_rank, metric_matrix
from convex_caldera.fit.rounding import (
    refine,
    round_ldlq,
    round_nearest,
    round_row_groups,
    round_two_sided,
)
from convex_caldera.linalg.factor import block_unit_upper
from convex_caldera.linalg.finite import all_finite

# Rows rounded together under a two-sided curvature: a trellis tile, and enough for one GEMM.
TILE_ROWS = 16


@dataclass(frozen=True)
class HalfStep:
    """One entry of the trace: which step of which sweep, and the relative loss after it."""

    sweep: int
    step: int
    relative_loss: float


@dataclass(frozen=True, eq=False)
class Fit:
    """A compressed layer with its own measure: trace, final loss, what happened on the way.

    `relative_loss` is tr(E H E^T) / tr(W H W^T), undamped, float64, of the layer as stored;
    `ridge` the damping actually added to the diagonal of H; `dead_channels` input channels that
    were zero on all calibration tokens and so were rounded without feedback.
    """

    layer: CompressedLayer
    trace: tuple[HalfStep, ...]
    loss: float
    relative_loss: float
    ridge: float
    dead_channels: int


def fit_layer(
    problem: Problem,
    recipe: Recipe,
    *,
    seed: int,
    layer: str,
    site: str,
    reported: Problem | None = None,
) -> Fit:
    """Carry out `recipe` on one matrix.

    Args:
        problem: W (m, n) and its Hessian; the Hessian's damping is replaced by the recipe's.
        recipe: transforms, steps, sweeps.
        seed, layer, site: all randomness comes from these; `site` names the shared input.
        reported: what the final loss is of, where rounding sees another target or metric.

    Raises:
        RecipeError: a rank or statistic that does not fit this matrix, or a transform that
            mixes rows whose metrics differ.
        NumericalError: H is not positive definite under the recipe's damping.

    Cost: the sum of the steps' costs, per sweep; see fit.rounding and fit.low_rank.
    """
    hessian = damp(problem.hessian, recipe.damping)
    output = problem.output and damp(problem.output, recipe.output_damping)
    groups = tuple(damp(group, recipe.damping) for group in problem.groups)
    damped = problem.moved(problem.W, hessian, output, groups)
    inner, transforms = _enter(damped, recipe, seed, layer, site)
    terms, trace = backfit(inner, recipe)
    compressed = CompressedLayer((problem.W.shape[0], problem.W.shape[1]), terms, transforms)
    reported = reported or problem
    loss = reported.loss(compressed.decode())
    return Fit(
        layer=compressed,
        trace=trace,
        loss=loss,
        relative_loss=reported.share(loss),
        ridge=hessian.ridge,
        dead_channels=int(hessian.dead.sum()),
    )


def damp(hessian: Hessian, damping: float) -> Hessian:
    """The Hessian under a recipe's damping; one object per damping, so factors are shared."""
    if hessian.damping == damping:
        return hessian
    return hessian.memo(
        ("damping", damping),
        lambda: Hessian(hessian.matrix, damping, hessian.name, hessian.statistics),
    )


def _enter(
    problem: Problem, recipe: Recipe, seed: int, layer: str, site: str
) -> tuple[Problem, tuple[FittedTransform, ...]]:
    """Change coordinates, outermost transform first."""
    W, hessian, output, fitted = problem.W, problem.hessian, problem.output, []
    groups = problem.groups
    for transform in recipe.transforms:
        fitted.append(transform.fit(W, hessian, seed=seed, layer=layer, site=site))
        W, hessian = fitted[-1].apply(W).contiguous(), fitted[-1].apply_hessian(hessian)
        turned = output and fitted[-1].apply_output(output)
        if groups and turned is not output:
            raise RecipeError(
                f"{layer}: {transform.kind} mixes output channels, but groups of them have metrics "
                "of their own; rotate the inputs alone"
            )
        output = turned
        groups = tuple(fitted[-1].apply_hessian(group) for group in groups)
    return problem.moved(W, hessian, output, groups), tuple(fitted)


def backfit(problem: Problem, recipe: Recipe) -> tuple[tuple[Term, ...], tuple[HalfStep, ...]]:
    """Terms in the order of the recipe's steps, and the trace of relative losses."""
    count = len(recipe.steps)
    terms: dict[int, Term] = {}
    values: dict[int, Tensor] = {}
    best: tuple[float, dict[int, Term]] | None = None
    trace = []
    for sweep in range(recipe.sweeps):
        for i, step in enumerate(recipe.steps):
            others = [values[k] for k in sorted(values) if k != i]
            residual = reduce(torch.sub, others, problem.W)
            terms[i] = fit_step(step, residual, problem, terms, terms.get(i))
            values[i] = terms[i].decode().to(problem.W.dtype)
            loss = problem.relative_loss(residual_sum(values, problem.W), problem.W.dtype)
            trace.append(HalfStep(sweep, i, loss))
            if len(terms) == count and (best is None or loss < best[0]):
                best = (loss, dict(terms))
    assert best is not None  # a recipe has at least one step and one sweep
    return tuple(best[1][i] for i in range(count)), tuple(trace)


def residual_sum(values: dict[int, Tensor], like: Tensor) -> Tensor:
    """The sum of all decoded terms."""
    return reduce(torch.add, (values[k] for k in sorted(values)), torch.zeros_like(like))


def fit_step(
    step: Step, residual: Tensor, problem: Problem, terms: dict[int, Term], previous: Term | None
) -> Term:
    """One half-step; the other terms matter only to the down-dated Hessian."""
    match step:
        case Quantize():
            low_rank = [t for t in terms.values() if isinstance(t, LowRank) and t.rank]
            right = torch.cat([t.right_matrix() for t in low_rank]) if low_rank else None
            return fit_coded(step, residual, problem, right)
        case FitLowRank():
            return fit_factors(step, residual, problem, previous)


def fit_coded(step: Quantize, residual: Tensor, problem: Problem, right: Tensor | None) -> Coded:
    """Round the residual; of several gains, the one with the least loss."""
    hessian = problem.hessian
    H, uppers = _rounding_metric(step, problem, right)
    importance = metric_matrix(hessian, "diagonal") if step.metric != "identity" else None
    inner = Problem(residual, hessian, problem.name, problem.output, problem.groups)

    def rounded(fitted: FittedQuantizer) -> tuple[Coded, Tensor]:
        codes, W_hat = _round(residual, fitted, uppers, problem)
        return Coded(codes, fitted, step.coder), W_hat

    def refined(coded: Coded, W_hat: Tensor) -> Coded:
        if not step.sweeps or H is None or problem.output is not None:
            return coded
        codes, _ = refine(residual, coded.codes, W_hat, coded.fitted, H, step.sweeps)
        return Coded(codes, coded.fitted, step.coder)

    best: tuple[float, Coded, Tensor] | None = None
    for gain in step.gains:
        fitted = step.quantizer.fit(residual, importance=importance, gain=gain)
        coded, W_hat = rounded(fitted)
        loss = inner.loss(W_hat, residual.dtype) if len(step.gains) > 1 else 0.0
        if best is None or loss < best[0]:
            best = (loss, coded, W_hat)
    assert best is not None  # Quantize has at least one gain
    coded = refined(*best[1:])
    while excess := _excess(coded):
        assert isinstance(coded.fitted, Widens)  # only what is limited exceeds
        coded = refined(*rounded(coded.fitted.widened(2.0 ** (excess + 0.002))))
    return coded


def _excess(coded: Coded) -> float:
    """Bits per weight by which entropy-coded codes exceed what their quantizer promised, or 0.

    Feedback widens what is rounded by its own errors, and so the codes' entropy, a little: b bits
    per weight too many ask for steps 2^b wider.
    """
    quantizer, shape = coded.fitted.quantizer, coded.fitted.shape
    if not isinstance(quantizer, RateLimited):
        return 0.0
    excess = coded.stored_codes[0].numel() - quantizer.most_coded_bytes(shape)
    return max(8 * excess / (shape[0] * shape[1]), 0.0)


def _round(
    W: Tensor, fitted: FittedQuantizer, uppers: tuple[Tensor, ...], problem: Problem
) -> tuple[Tensor, Tensor]:
    """Nearest without feedback, LDLQ with one side's, tile by tile with both, or by row groups."""
    if not uppers:
        return round_nearest(W, fitted)
    if problem.groups:
        return round_row_groups(W, fitted, uppers, problem.row_groups)
    if problem.output is None:
        return round_ldlq(W, fitted, uppers[0])
    rows = max(fitted.row_block, TILE_ROWS)
    return round_two_sided(W, fitted, uppers[0], problem.output.unit_upper(rows), rows)


def _rounding_metric(
    step: Quantize, problem: Problem, right: Tensor | None
) -> tuple[Tensor | None, tuple[Tensor, ...]]:
    """H, and the feedback U of the matrix or of every row group; nothing without feedback."""
    if step.metric != "full":
        return None, ()
    block = step.quantizer.block
    seen = problem.groups or (problem.hessian,)
    if step.downdate and right is not None:
        rests = [downdated(hessian, right) for hessian in seen]
        uppers = (block_unit_upper(H, block, problem.name) for H in rests)
        return rests[0].float(), tuple(uppers)
    uppers = (hessian.unit_upper(block) for hessian in seen)
    return problem.hessian.damped_as(torch.float32), tuple(uppers)


def downdated(hessian: Hessian, right: Tensor) -> Tensor:
    """H minus what the row space of R serves: H - H R^T (R H R^T)^-1 R H, damped again.

    Directions that the low-rank term can correct stop steering the feedback (the CALDERA code's
    "Hessian down-date"). A Schur complement, so positive semidefinite by construction: where
    their code takes an SVD of L R M and an eigendecomposition, this needs one r x r solve.
    """
    H, R = hessian.damped, right.double()
    HR = H @ R.T
    gram = R @ HR
    ridge = 1e-9 * float(gram.diagonal().mean()) + 1e-300
    gram = gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    rest = H - HR @ torch.cholesky_solve(HR.T, torch.linalg.cholesky(gram))
    rest = 0.5 * (rest + rest.T)
    level = hessian.damping * float(rest.diagonal().mean()) + hessian.ridge
    return rest + level * torch.eye(len(rest), dtype=rest.dtype, device=rest.device)


def fit_factors(
    step: FitLowRank, residual: Tensor, problem: Problem, previous: Term | None
) -> LowRank:
    """Low-rank step: closed form, then coded if the recipe says so."""
    hessian = problem.hessian
    start = previous.left_matrix() if isinstance(previous, LowRank) and step.rank else None
    H = metric_matrix(hessian, step.metric)
    # The identity sees neither side of a curvature.
    seen = problem.output if step.metric != "identity" else None
    output = seen.root.to(residual.dtype) if seen else None
    left, right = fit_low_rank(residual, H, step.rank, start=start, output_root=output)
    if step.factors is None or step.rank == 0:
        return dense_factors(left, right)
    if step.metric == "full":
        metric, block = hessian.damped, step.factors.quantizer.block
        feedback = hessian.unit_upper(block) if step.factors.feedback else None
    else:
        diagonal = torch.ones(len(hessian), dtype=torch.float64) if H is None else H
        metric, feedback = torch.diag(diagonal.to(residual.device)), None
    O = seen.damped if seen else None
    return fit_coded_factors(residual, metric, feedback, left, right, step.factors, O)


def dense_factors(left: Tensor, right: Tensor) -> LowRank:
    """Factors in float16, each component's norm split evenly so that neither side overflows.

    Raises NumericalError where float16 cannot hold a factor.
    """
    share = (right.norm(dim=1) / left.norm(dim=0).clamp(min=1e-30)).clamp(min=1e-30).sqrt()
    halves = (left * share).half(), (right / share[:, None]).half()
    if not all(map(all_finite, halves)):
        raise NumericalError("low-rank factors exceed float16; rescale the weight or code them")
    return LowRank(Dense(halves[0]), Dense(halves[1]))
