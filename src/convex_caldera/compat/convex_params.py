"""Parameters of Convex-CALDERA under the mission's names, each with a meaning that holds.

Defaults differ where the original's cannot work: `mu`, `kappa`, `k`, the bits of the factors and
`Q_bits` are None, which means "measured or chosen from the data" (there: constants that make the
low-rank part zero or the bits arbitrary); `B_tot` counts every stored bit, so the 2.0 of the
first version is not feasible with 2-bit codes and their scales, and the default is 4.0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from convex_caldera.errors import RecipeError

SOLVER = "structured"
DENSE_BITS = 16
CODE_BITS = (*range(1, 9), DENSE_BITS)
FACTOR_BITS = (*range(2, 9), DENSE_BITS)


@dataclass
class ConvexCalderaParams:
    """What to spend, how to weigh it, and what to choose from.

    Budget
        B_tot: stored bits per original weight, everything counted (codes, scales, factors).
        b_min, b_max: range of the code bits b_g of a group.
        discrete_bits: code bits on offer, 1 to 8, or 16 for float16; those outside
            [b_min, b_max] are not used.
        Q_bits: pins the code bits of every group; None lets the program choose.
        num_groups: runs of columns whose bits are decided separately; at most one a column.
        per_channel: one scale per output row and group; False also offers one per group and
            one per 128 or 64 columns, and takes what the budget is best spent on.

    Program
        mu: weight of the nuclear norm. None seeks the one whose rank is `target_rank` or, without
            that, the rank that earns its bits (see `convex_program.earned_rank`).
        tau_star: bound on the nuclear norm instead; where given, `mu` is not used.
        lambda_reg: weight of the quantization loss q; 1 counts it like the misfit.
        kappa: residual energy per unit of q; None measures it (see `convex_program.constants_of`).
        k: decay of the distortion c exp(-k b) per bit, nats; None fits it to the quantizer.
        solver: "structured", the only one: it reaches gaps that conic solvers do not.
        solver_verbose: report each solve to the logger `convex_caldera`, level INFO.
        solver_tol: relative primal-dual gap at which the program is solved.

    Low-rank part
        target_rank: rank sought by `mu`; with `mu` or `tau_star` given, the rank kept at most.
        rank_budget: never more than this rank. With neither, the rank that earns its bits.
        quantize_factors, factor_bits: code both factors with 2 to 8 bits; 16 is float16.
        L_bits, R_bits: the same for one factor; giving one quantizes it.
        inner_iters: alternations of codes and factors; the best state is kept.

    Without meaning for one matrix, refused when changed: tolerance, apply_qat.

    Raises:
        RecipeError: a value out of range, or two that contradict each other.
    """

    B_tot: float = 4.0
    b_min: float = 2.0
    b_max: float = 8.0
    tau_star: float | None = None
    mu: float | None = None
    lambda_reg: float = 1.0
    kappa: float | None = None
    k: float | None = None
    discrete_bits: Sequence[int] = (2, 3, 4, 8, 16)
    solver: str = SOLVER
    solver_verbose: bool = False
    solver_tol: float = 1e-4
    tolerance: float = 0.05
    apply_qat: bool = False
    quantize_factors: bool = False
    factor_bits: int = DENSE_BITS
    rank_budget: int | None = None
    num_groups: int = 8
    target_rank: int | None = None
    L_bits: int | None = None
    R_bits: int | None = None
    Q_bits: int | None = None
    inner_iters: int = 3
    per_channel: bool = False

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Refuse what contradicts itself; called again at use, as fields may be assigned."""
        _refuse_idle(self)
        _check_numbers(self)
        if not self.widths:
            raise RecipeError(
                f"none of discrete_bits {list(self.discrete_bits)} lies within b_min "
                f"{self.b_min} and b_max {self.b_max}"
            )
        if self.factor_bits != DENSE_BITS and not self.quantize_factors:
            raise RecipeError(
                f"factor_bits={self.factor_bits} is read with quantize_factors=True only; "
                "set that too, or leave factor_bits out"
            )

    @property
    def widths(self) -> tuple[int, ...]:
        """Code bits to choose from, ascending."""
        if self.Q_bits is not None:
            return (self.Q_bits,)
        return tuple(sorted({b for b in self.discrete_bits if self.b_min <= b <= self.b_max}))

    @property
    def seeks_mu(self) -> bool:
        """Whether mu is sought for a rank: neither it nor tau_star is given."""
        return self.mu is None and self.tau_star is None

    @property
    def left_bits(self) -> int:
        """Bits of an entry of the left factor; 16 is float16."""
        return self._bits_of_factor(self.L_bits)

    @property
    def right_bits(self) -> int:
        return self._bits_of_factor(self.R_bits)

    def _bits_of_factor(self, own: int | None) -> int:
        if own is not None:
            return own
        return self.factor_bits if self.quantize_factors else DENSE_BITS


def _refuse_idle(params: ConvexCalderaParams) -> None:
    """Fields that nothing could read."""
    if params.solver != SOLVER:
        raise RecipeError(
            f"solver {params.solver!r} is not offered, only {SOLVER!r}: a conic solver needs a "
            "cone of side m + n and reports optimal far from the optimum; leave `solver` out"
        )
    if params.tolerance != 0.05:
        raise RecipeError(
            "tolerance has no meaning: no step stops at an error; set B_tot, and read "
            "relative_error of the result"
        )
    if params.apply_qat:
        raise RecipeError("apply_qat has no meaning for one matrix: training needs the model")


def _check_numbers(p: ConvexCalderaParams) -> None:
    if not (math.isfinite(p.B_tot) and p.B_tot > 0):
        raise RecipeError(f"B_tot is a positive number of bits per weight, got {p.B_tot}")
    if not 1 <= p.b_min <= p.b_max <= DENSE_BITS:
        raise RecipeError(f"need 1 <= b_min <= b_max <= 16, got {p.b_min} and {p.b_max}")
    for name in ("mu", "tau_star", "lambda_reg"):
        value = getattr(p, name)
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise RecipeError(f"{name} must be finite and >= 0, got {value}")
    for name in ("kappa", "k", "solver_tol"):
        value = getattr(p, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise RecipeError(f"{name} must be finite and > 0, got {value}")
    for name, least in (("rank_budget", 0), ("target_rank", 0), ("num_groups", 1)):
        value = getattr(p, name)
        if value is not None and value < least:
            raise RecipeError(f"{name} must be >= {least}, got {value}")
    if p.inner_iters < 1:
        raise RecipeError(f"inner_iters must be >= 1, got {p.inner_iters}")
    wrong = [b for b in (*p.discrete_bits, p.Q_bits) if b is not None and b not in CODE_BITS]
    if wrong:
        raise RecipeError(f"codes have 1 to 8 bits, or 16 for float16; got {wrong[0]}")
    for name in ("factor_bits", "L_bits", "R_bits"):
        value = getattr(p, name)
        if value is not None and value not in FACTOR_BITS:
            raise RecipeError(f"{name} is 2 to 8, or 16 for float16; got {value}")
