"""`convex_caldera(W, H, ...)`: the mission's seven steps on one matrix, each done as it says.

    calibrate   H given, or X^T X / T of calibration data, or I; constants c, k, kappa measured
    solve       the convex program, certified by a dual bound          (compat.convex_program)
    round       bits near b* for every group of columns, by measured loss, under the whole budget
    factor      Z by SVD to the rank kept, shrinkage undone; the factors coded
    quantize    W minus the DECODED low-rank part, with feedback under H  (compat.convex_groups)
    verify      gap, bits, rank and errors of what is stored
    return      the stored parts, and what was measured

Different from the original: the cone is the right way round, the gap is primal minus dual, bits
count everything stored over m n, no mass is lost between the terms, and a budget that cannot be
met raises. A whole model is compressed by `convex_caldera.compress`, with better codes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from convex_caldera.allocate.curves import Curves, Group, Option
from convex_caldera.allocate.plan import Plan, allocate
from convex_caldera.allocate.program import ProgramSolution
from convex_caldera.compat.convex_factors import code_factors
from convex_caldera.compat.convex_groups import (
    ColumnGroups,
    Format,
    column_groups,
    measured,
    round_groups,
)
from convex_caldera.compat.convex_params import ConvexCalderaParams
from convex_caldera.compat.convex_program import Solved, solve_within
from convex_caldera.compat.convex_sizes import Sizes
from convex_caldera.core.hessian import Hessian
from convex_caldera.core.problem import Problem
from convex_caldera.core.terms import Coded, Dense, LowRank
from convex_caldera.errors import NumericalError, RecipeError, ShapeError
from convex_caldera.fit.low_rank import fit_low_rank
from convex_caldera.linalg.finite import all_finite

NEAR = 2  # widths on offer on each side of b*


@dataclass(eq=False)
class ConvexCalderaResult:
    """W ~ W_compressed = L_star + R_star, exactly what is stored in `low_rank` and `parts`.

    Attributes:
        L_star, R_star, W_compressed: (m, n) float32; decoded low-rank part, decoded codes, sum.
        b_star: the program's code bits, one per group of columns. b_discrete: those stored.
        avg_bit_width: stored bits over m n, everything counted; at most B_tot.
        effective_rank: rank of the stored low-rank part.
        duality_gap: primal - dual of the convex program, in units of its objective.
        objective_value: the program's primal value. solver_status: "optimal" or "stopped".
        solve_time: seconds for the program, measuring its constants and seeking mu included.
        residual_norm: ||W - W_compressed||_F. relative_error: the same over ||W||_F.
        relative_loss: tr(E H E^T) / tr(W H W^T), undamped.
        group_info: "L", "R_lr" (decoded factors), "delta" (scales per group), "groups" (what
            each group was given and measured), "certificates" ("program" and "plan").
        solution: the program's own, with all that is needed to recompute its bound.
    """

    L_star: Tensor
    R_star: Tensor
    W_compressed: Tensor
    b_star: list[float]
    b_discrete: list[int]
    avg_bit_width: float
    effective_rank: int
    duality_gap: float
    residual_norm: float
    relative_error: float
    relative_loss: float
    solve_time: float
    solver_status: str
    objective_value: float
    low_rank: LowRank | None
    parts: tuple[Coded | Dense, ...]
    solution: ProgramSolution
    group_info: dict[str, Any] = field(default_factory=dict)

    @property
    def relative_duality_gap(self) -> float:
        return self.solution.gap

    def stored_bytes(self) -> int:
        """Bytes of codes, scales and factors."""
        low = 0 if self.low_rank is None else self.low_rank.stored_bytes()
        return low + sum(part.stored_bytes() for part in self.parts)


def convex_caldera(
    W: Tensor,
    H: Tensor | None = None,
    calibration_data: Tensor | None = None,
    params: ConvexCalderaParams | None = None,
    device: str | torch.device = "cpu",
) -> ConvexCalderaResult:
    """Decompose one weight under a budget of stored bits.

    Args:
        W: (m, n), out_features first.
        H: (n, n) or its diagonal (n,), E[x x^T]; damped by 1 % of its mean diagonal.
        calibration_data: inputs (..., n) to compute H from, instead of H. Neither: H = I.
        params: see `ConvexCalderaParams`.
        device: where to compute.

    Raises:
        InfeasibleBudgetError: B_tot is below the cheapest codes; carries the least bits.
        RecipeError: parameters contradict each other, or both H and calibration_data are given.
        ShapeError, NumericalError: of W, H and calibration_data.

    Cost: one certified solve (and ten loose ones if mu is sought for a rank above zero), then about
    forty roundings of the matrix at 2 m n^2 flops each.
    """
    params = params or ConvexCalderaParams()
    params.check()
    problem = _problem(W, H, calibration_data, device)
    groups = column_groups(problem.hessian, params.num_groups)
    sizes = Sizes.of(params, W.shape, groups)
    started = time.perf_counter()
    solved = solve_within(problem, groups, sizes)
    seconds = time.perf_counter() - started
    terms = _fit_terms(problem, groups, sizes, solved)
    return _result(problem, groups, solved, terms, seconds)


def convex_caldera_decompose(
    W: Tensor,
    H: Tensor | None = None,
    params: ConvexCalderaParams | None = None,
    device: str | torch.device = "cpu",
) -> ConvexCalderaResult:
    """`convex_caldera` under the name that later versions gave it."""
    return convex_caldera(W, H, params=params, device=device)


@dataclass(frozen=True, eq=False)
class _Terms:
    """A state of the alternation: what would be stored, its decoded sum, and its loss."""

    low_rank: LowRank | None
    parts: tuple[Coded | Dense, ...]
    low: Tensor
    codes: Tensor
    loss: float
    formats: tuple[Format, ...]
    plan: Plan


def _problem(
    W: Tensor, H: Tensor | None, data: Tensor | None, device: str | torch.device
) -> Problem:
    if W.dim() != 2 or W.numel() == 0:
        raise ShapeError(f"W must be a non-empty matrix (m, n), got {tuple(W.shape)}")
    if H is not None and data is not None:
        raise RecipeError("give H or calibration_data, not both")
    n = W.shape[1]
    if data is not None:
        H = _second_moment(data, n, device)
    if H is None:
        hessian = Hessian.identity(n, device)
    else:
        hessian = Hessian((torch.diag(H) if H.dim() == 1 else H).to(device))
    return Problem(W.detach().to(device).float(), hessian, "W")


def _second_moment(data: Tensor, n: int, device: str | torch.device) -> Tensor:
    """X^T X / T, float64."""
    if data.dim() < 2 or data.shape[-1] != n or data.numel() == 0:
        raise ShapeError(f"calibration_data must be (tokens, {n}), got {tuple(data.shape)}")
    X = data.detach().to(device).reshape(-1, n).double()
    if not all_finite(X):
        row = int((~torch.isfinite(X)).any(dim=1).nonzero()[0])
        raise NumericalError(f"calibration_data has NaN or infinite entries, first at row {row}")
    return X.T @ X / len(X)


def _fit_terms(problem: Problem, groups: ColumnGroups, sizes: Sizes, solved: Solved) -> _Terms:
    """Low-rank part, then codes of what it leaves, in alternation; the state of least loss."""
    W, rank = problem.W, solved.rank
    # Z's column space, with the best row side for it under any H: undoes the norm's shrinkage.
    left = solved.U
    right = left.T @ W.double()
    target, plan, best = left @ right, None, None
    for _ in range(sizes.params.inner_iters if rank else 1):
        low_rank = code_factors(target, problem.hessian, left, right, sizes.params)
        low = torch.zeros_like(W) if low_rank is None else low_rank.decode().to(W)
        if plan is None:
            plan, chosen = _plan(W - low, groups, sizes, solved)
        parts, codes = round_groups(W - low, groups, chosen)
        loss = problem.loss(low + codes)
        if best is None or loss < best.loss:
            best = _Terms(low_rank, parts, low, codes, loss, chosen, plan)
        target = (W - codes).double()
        left, right = fit_low_rank(target, problem.hessian.damped, rank)
    assert best is not None  # inner_iters >= 1
    return best


def _plan(
    A: Tensor, groups: ColumnGroups, sizes: Sizes, solved: Solved
) -> tuple[Plan, tuple[Format, ...]]:
    """A format per group by measured loss, within what the factors leave of the budget."""
    menus, curves = [], []
    for g, group in enumerate(groups.groups):
        menu = _near(sizes.menu(group), solved.solution.bits[g])
        losses = measured(A, group, menu)
        options = [Option(how.label, sizes.stored_bits(group, how), losses[how]) for how in menu]
        curves.append(Group(f"{g:04d}", sizes.weights(group), tuple(options)))
        menus.append({how.label: how for how in menu})
    plan = allocate(Curves(tuple(curves), ()), sizes.total - sizes.factor_bits(solved.rank))
    chosen = [menu[plan.choice[f"{g:04d}"]] for g, menu in enumerate(menus)]
    return plan, tuple(chosen)


def _near(menu: Sequence[Format], bits: float) -> list[Format]:
    """The formats of the widths next to the program's bits, and the least one, which fits."""
    widths = sorted({how.bits for how in menu})
    below = [width for width in widths if width <= bits]
    above = [width for width in widths if width > bits]
    kept = {widths[0], *below[-NEAR:], *above[:NEAR]}
    return [how for how in menu if how.bits in kept]


def _result(
    problem: Problem, groups: ColumnGroups, solved: Solved, terms: _Terms, seconds: float
) -> ConvexCalderaResult:
    W, solution = problem.W, solved.solution
    W_hat = terms.low + terms.codes
    error = float((W.double() - W_hat.double()).norm())
    norm, energy = float(W.double().norm()), problem.energy
    result = ConvexCalderaResult(
        L_star=terms.low,
        R_star=terms.codes,
        W_compressed=W_hat,
        b_star=list(solution.bits),
        b_discrete=[how.bits for how in terms.formats],
        avg_bit_width=0.0,
        effective_rank=solved.rank,
        duality_gap=solution.primal - solution.dual,
        residual_norm=error,
        relative_error=error / norm if norm > 0 else float(error > 0),
        relative_loss=terms.loss / energy if energy > 0 else float(terms.loss > 0),
        solve_time=seconds,
        solver_status=solution.status,
        objective_value=solution.primal,
        low_rank=terms.low_rank,
        parts=terms.parts,
        solution=solution,
        group_info=_group_info(W, groups, solved, terms),
    )
    result.avg_bit_width = 8 * result.stored_bytes() / W.numel()
    return result


def _group_info(W: Tensor, groups: ColumnGroups, solved: Solved, terms: _Terms) -> dict[str, Any]:
    low, (m, n), solution = terms.low_rank, W.shape, solved.solution
    rows = zip(groups.groups, solved.constants, terms.formats, terms.parts, strict=True)
    return {
        "L": W.new_zeros((m, 0)) if low is None else low.left_matrix(),
        "R_lr": W.new_zeros((0, n)) if low is None else low.right_matrix(),
        "delta": [
            part.fitted.tensors()["scales"].float() if isinstance(part, Coded) else None
            for part in terms.parts
        ],
        "groups": [
            {
                "columns": (group.place.start, group.place.stop),
                "format": how.label,
                "stored_bits": 8 * part.stored_bytes(),
                "c": constants.c,
                "k": constants.k,
                "kappa": constants.kappa,
                "k_source": constants.source,
            }
            for group, constants, how, part in rows
        ],
        "certificates": {
            "program": {
                "primal": solution.primal,
                "dual": solution.dual,
                "gap": solution.gap,
                "price": solution.price,
                "budget": solution.budget,
                "mu": solved.mu,
                "tau": solved.tau,
                "ranks": solution.ranks,
                "steps": solution.steps,
            },
            "plan": terms.plan.to_dict(),
        },
    }
