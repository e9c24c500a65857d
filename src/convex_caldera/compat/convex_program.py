"""The convex program of one matrix: its constants measured, its penalty sought, its budget met.

Each group of columns is one group of `allocate.program.solve_program` with its own low-rank
variable; together they are Z. The program has no price for rank, so the bits of the factors are
set aside first and the rest is what sum p_g b_g may spend; solved again if the rank outgrew what
was set aside.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from convex_caldera.allocate.program import ProgramSolution, solve_program
from convex_caldera.allocate.surrogate import RateModel, fit_decay, solve_surrogate
from convex_caldera.compat.convex_groups import ColumnGroups, measured
from convex_caldera.compat.convex_params import DENSE_BITS
from convex_caldera.compat.convex_sizes import Sizes
from convex_caldera.core.problem import Problem
from convex_caldera.errors import DataError
from convex_caldera.fit.low_rank import fit_low_rank
from convex_caldera.linalg.dual_norm import spectral_norm_bound
from convex_caldera.linalg.rank_search import least_within

HIGH_RATE_DECAY = 2 * math.log(2)  # 6.02 dB per bit
BUDGET_ROUNDS = 4  # each sets aside what the last one's factors need
ENERGY_SHARE = 0.5  # of the residual's energy that q pays for, where a low-rank part is meant
MOST_STEPS, SEARCH_STEPS = 400, 60  # of the solver; stopping early shows in the gap
MU_PRECISION = 1.02  # ratio of the bracket of mu at which its search ends
MU_RANGE = 1e-4  # least mu sought, as a share of the one that makes Z zero
SEARCH_TOLERANCE = 1e-3  # relative gap at which the rank is read off during the search
FLOAT16_PRECISION = 11
RANK_TOLERANCE = 1e-6  # of the largest singular value: what counts towards the rank of Z

_log = logging.getLogger("convex_caldera")


@dataclass(frozen=True)
class Constants:
    """c, k and kappa of one group; `source` says whether k was "fitted", "given" or "theory".

    c is in the unit of the misfit, 1/2 tr(E H E^T); q >= c exp(-k b) then counts like it.
    """

    c: float
    k: float
    kappa: float
    source: str


@dataclass(frozen=True, eq=False)
class Solved:
    """The program's solution, the constants it was solved with, and what is kept of its Z.

    U (m, rank) and S (rank,) are the leading left singular vectors and values of Z.
    """

    solution: ProgramSolution
    constants: tuple[Constants, ...]
    mu: float | None
    tau: tuple[float, ...] | None
    U: Tensor
    S: Tensor
    rank: int


def solve_within(problem: Problem, groups: ColumnGroups, sizes: Sizes) -> Solved:
    """Solve the program so that codes and factors together keep to the budget.

    Cost: one solve where mu or tau is given and the rank is known; up to four otherwise, and
    ten loose ones before it where mu is sought for a rank above zero.
    """
    params, sought = sizes.params, sizes.params.seeks_mu
    limit = _most_rank(problem, sizes)
    wanted = limit if sought else 0
    residual, reserved, rank = _without(problem, limit), 0, wanted
    share = ENERGY_SHARE if limit or not sought else 1.0
    for _ in range(BUDGET_ROUNDS):
        reserved = max(reserved, rank)
        program = _Program(problem, groups, sizes, residual, share, sizes.code_budget(reserved))
        mu = program.mu_for_rank(wanted) if sought else params.mu
        solution = program.solve(mu, params.solver_tol)
        U, S = _column_space(solution)
        rank = min(len(S), limit)
        if rank <= reserved:
            break
    kept = min(rank, reserved)
    constants, tau = tuple(program.constants), program.tau
    used = None if tau else mu
    return Solved(solution, constants, used, tau, U[:, :kept], S[:kept], kept)


def earned_rank(
    singular_values: Tensor,
    decay: float,
    bits_per_rank: float,
    most: int,
    precision: int = FLOAT16_PRECISION,
) -> int:
    """The rank that earns its bits: argmin over r <= most of log E_r + decay * bits_per_rank * r.

    A quantizer's distortion is proportional to the energy E_r left after rank r and falls by
    exp(-decay) per bit of every weight; so a component pays if it lowers log E by more than the
    same bits do in the codes.

    Args:
        singular_values: of W M with M M^T = H, descending.
        decay: k, nats per bit.
        bits_per_rank: stored bits of one rank's factors per original weight.
        most: the largest rank to consider.
        precision: bits of a factor's entry; what they cannot resolve is left over in any case.
    """
    energy = singular_values.double().square()
    total = float(energy.sum())
    if total == 0.0 or most == 0:
        return 0
    left = torch.cat([energy.flip(0).cumsum(0).flip(0), energy.new_zeros(1)])[: most + 1]
    floor = total * 2.0 ** (-2 * precision)
    cost = left.clamp(min=floor).log() + decay * bits_per_rank * torch.arange(
        len(left), dtype=torch.float64, device=left.device
    )
    return int(cost.argmin())


def constants_of(
    A: Tensor, groups: ColumnGroups, sizes: Sizes, budget: float, share: float = 1.0
) -> list[Constants]:
    """Constants of every group from the quantizer's measured loss on A (m, n).

    c and k are fitted to the losses at the widths on offer (`k` given: c alone; fewer than two
    widths, or noise that hides the fall: k = 2 ln 2). kappa is the residual energy per unit of
    distortion where both sides of q bind: at the bits b_g of reverse water-filling,
    share ||A_g||^2 = kappa_g c_g exp(-k_g b_g). A share below 1 makes the residual's energy worth
    something, so that Z takes what mu allows; with 1 and A = W, Z is zero for every mu > 0 and
    the bits are those of reverse water-filling.
    """
    fits = []
    for group in groups.groups:
        points = measured(A, group, sizes.reference)
        losses = {how.bits: 0.5 * loss for how, loss in points.items() if loss > 0}
        fits.append(_fit(losses, sizes.params.k))
    bits = _waterfilling(fits, groups, sizes, budget)
    constants = []
    for (c, k, source), b, group in zip(fits, bits, groups.groups, strict=True):
        energy = float(A[:, group.place].double().square().sum())
        measured_kappa = share * energy * math.exp(k * b) / c if c > 0 and energy > 0 else 1.0
        constants.append(Constants(c, k, sizes.params.kappa or measured_kappa, source))
    return constants


def _fit(losses: dict[int, float], given: float | None) -> tuple[float, float, str]:
    """(c, k, source) of loss = c exp(-k bits); float16 does not lie on that line."""
    coded = {b: d for b, d in losses.items() if b < DENSE_BITS} or losses
    if not coded:
        return 0.0, given or HIGH_RATE_DECAY, "theory" if given is None else "given"
    k, source = given or HIGH_RATE_DECAY, "theory" if given is None else "given"
    if given is None and len(coded) > 1:
        try:
            c, fitted = fit_decay(list(coded), list(coded.values()))
            return c, fitted, "fitted"
        except DataError:  # the loss does not fall: keep the theory's k, and say so
            source = "theory"
    mean = sum(math.log(d) + k * b for b, d in coded.items()) / len(coded)
    return math.exp(mean), k, source


def _waterfilling(
    fits: Sequence[tuple[float, float, str]],
    groups: ColumnGroups,
    sizes: Sizes,
    budget: float,
) -> list[float]:
    low, high = sizes.code_range
    models = [
        RateModel(f"group {g}", sizes.weights(group), float(c > 0), c or 1.0, k, (low, high))
        for g, ((c, k, _), group) in enumerate(zip(fits, groups.groups, strict=True))
    ]
    return list(solve_surrogate(models, budget).bits)


class _Program:
    """One instance: data, constants and budget; solved for one mu or tau after another."""

    def __init__(
        self,
        problem: Problem,
        groups: ColumnGroups,
        sizes: Sizes,
        residual: Tensor,
        share: float,
        budget: float,
    ):
        params = sizes.params
        self.W = [problem.W[:, group.place].double() for group in groups.groups]
        self.H = [group.H for group in groups.groups]
        self.p = [float(sizes.weights(group)) for group in groups.groups]
        self.range, self.budget, self.params = sizes.code_range, budget, params
        self.constants = constants_of(residual, groups, sizes, budget, share)
        self.tau = None if params.tau_star is None else self._shares(params.tau_star)

    def solve(self, mu: float | None, tol: float, most_steps: int = MOST_STEPS) -> ProgramSolution:
        """The penalty form at mu, or the constrained form where tau_star is given."""
        each = self.constants
        solution = solve_program(
            self.W,
            self.H,
            mu=None if self.tau else mu,
            tau=self.tau,
            lam=self.params.lambda_reg,
            kappa=[x.kappa for x in each],
            c=[x.c for x in each],
            k=[x.k for x in each],
            p=self.p,
            b_min=self.range[0],
            b_max=self.range[1],
            budget=self.budget,
            tol=tol,
            most_steps=most_steps,
        )
        if self.params.solver_verbose:
            _log.info(
                "program %s: mu %s, value %.6g, gap %.2e, price %.3e, ranks %s, %d steps",
                solution.status, mu, solution.primal, solution.gap, solution.price,
                solution.ranks, solution.steps,
            )  # fmt: skip
        return solution

    def mu_for_rank(self, rank: int) -> float:
        """The least mu found at which no group's low-rank part exceeds `rank`."""
        high = max(self._silencing(g) for g in range(len(self.W)))
        if rank == 0 or high == 0.0:
            return high
        tol = max(SEARCH_TOLERANCE, self.params.solver_tol)

        def rank_at(mu: float) -> int:
            return max(self.solve(mu, tol, SEARCH_STEPS).ranks)

        return least_within(rank_at, rank, high, MU_RANGE * high, MU_PRECISION)

    def _silencing(self, g: int) -> float:
        """A mu from which on Z_g = 0: ||W_g H_s||_2 at the largest multiplier s."""
        twice = 2 * self.params.lambda_reg / self.constants[g].kappa
        H = self.H[g]
        eye = torch.eye(len(H), dtype=H.dtype, device=H.device)
        return spectral_norm_bound(self.W[g] @ torch.linalg.solve(H + twice * eye, twice * H))

    def _shares(self, tau: float) -> tuple[float, ...]:
        """tau split by the groups' norms: then ||Z||_* <= sum ||Z_g||_* <= tau."""
        norms = [float(W.norm()) for W in self.W]
        total = sum(norms)
        return tuple(tau * (norm / total if total > 0 else 1 / len(norms)) for norm in norms)


def _most_rank(problem: Problem, sizes: Sizes) -> int:
    """The rank kept at most, and sought: as asked for, or what earns its bits."""
    params = sizes.params
    most = sizes.most_rank(params.rank_budget)
    if params.target_rank is not None:
        return min(most, params.target_rank)
    if most == 0 or (params.rank_budget is not None and not params.seeks_mu):
        return most
    values = torch.linalg.svdvals(problem.W.double() @ problem.hessian.root)
    bits_per_rank = sizes.factor_bits(1) / problem.W.numel()
    precision = min(params.left_bits, params.right_bits, FLOAT16_PRECISION)
    return earned_rank(values, params.k or HIGH_RATE_DECAY, bits_per_rank, most, precision)


def _without(problem: Problem, rank: int) -> Tensor:
    """W less its best approximation of a rank under H, float32: what will be quantized."""
    if rank == 0:
        return problem.W
    W = problem.W.double()
    left, right = fit_low_rank(W, problem.hessian.damped, rank)
    return (W - left @ right).to(problem.W.dtype)


def _column_space(solution: ProgramSolution) -> tuple[Tensor, Tensor]:
    """Left singular vectors and values of Z = [Z_1 Z_2 ..], without those that are rounding.

    Z = [A_1 B_1, A_2 B_2, ..] has the Gram matrix sum_g A_g (B_g B_g^T) A_g^T; an SVD of
    [A_g T_g^T], B_g^T = P_g T_g, is that of Z without forming it.
    """
    parts = [left @ torch.linalg.qr(right.T).R.T for left, right in solution.low_rank]
    U, S, _ = torch.linalg.svd(torch.cat(parts, dim=1), full_matrices=False)
    keep = int((S > RANK_TOLERANCE * S.max()).sum()) if len(S) else 0
    return U[:, :keep], S[:keep]
