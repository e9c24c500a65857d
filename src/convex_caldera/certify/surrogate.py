"""The joint rate program: primal and dual values recomputed to fifty digits.

    minimise    sum_g alpha_g exp(v_g)
    subject to  v_g = log c_g + psi_g(rho_g) - k_g b_g ,   sum_g p_g (b_g + rho_g) <= B ,
                b in its box, rho in [0, rho_max],  psi the lower convex envelope of log_energy.

For any price nu >= 0 the sum over groups of min [ alpha exp(v) + nu p (b + rho) ], less nu B,
bounds every allocation within the budget. Along the segments of psi and the one of b, steepest
first, a group's function is convex in the widths x_j taken:

    F(x) = A exp(-sum_j s_j x_j) + nu p sum_j x_j
         >= F(y) + sum_j min over 0 <= x_j <= w_j of dF/dx_j(y) (x_j - y_j)

for any y: with y near the minimiser the right side is the bound, whatever rounding did to y.
Values are `decimal` numbers of 60 digits, whose operations are correctly rounded, so nothing
that a double could show is lost.
"""

from __future__ import annotations

import decimal
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from itertools import pairwise
from typing import Any

from convex_caldera.certify.plan_claims import certificate_of, curves_of
from convex_caldera.certify.reader import Output
from convex_caldera.certify.strict import listing, natural, number, short, string, table
from convex_caldera.errors import CheckError, FormatError

KEYS = ("form", "primal", "dual", "gap", "price", "budget_bits", "groups")
GROUP_KEYS = (
    "name",
    "weights",
    "alpha",
    "scale",
    "decay",
    "bits",
    "factor_bits",
    "log_energy",
    "solution_bits",
    "solution_factor_bits",
)
FORM = "joint"
# Relative to the magnitudes added up: what honest double arithmetic may lose.
SLACK = Decimal("1e-11")
CONTEXT = decimal.Context(prec=60, traps=[decimal.InvalidOperation, decimal.Overflow])
ZERO = Decimal(0)


@dataclass(frozen=True)
class Group:
    """Constants of one group, and the point of the primal. `segments` are (slope lost, width)."""

    name: str
    weights: Decimal
    start: Decimal  # alpha exp(v) at the least b and rank 0
    decay: Decimal
    bits: tuple[Decimal, Decimal]
    hull: tuple[tuple[Decimal, Decimal], ...]  # (rho, psi)
    chosen: tuple[Decimal, Decimal]  # b, rho

    @property
    def segments(self) -> list[tuple[Decimal, Decimal]]:
        """Steepest first; only those along which the distortion falls."""
        rows = [(self.decay, self.bits[1] - self.bits[0])]
        rows += [((u - v) / (y - x), y - x) for (x, u), (y, v) in pairwise(self.hull)]
        return sorted((row for row in rows if row[0] > 0), key=lambda row: -row[0])


def check(output: Output) -> str:
    """The claim of a certificate's surrogate; raises CheckError where a value flatters."""
    certificate = certificate_of(output)
    record = table(certificate["surrogate"], KEYS, "surrogate")
    curves = curves_of(output)
    if record["form"] != FORM:
        raise FormatError(f"surrogate: the form {short(record['form'])} is not recomputed here")
    with decimal.localcontext(CONTEXT):
        groups = [read_group(item) for item in listing(record["groups"], "surrogate.groups")]
        weights = {group.name: group.weights for group in groups}
        if len(weights) != len(groups) or weights != dict(curves.weights):
            raise CheckError("the surrogate's groups are not those of the curves")
        return compare(groups, record, number(record["budget_bits"], "surrogate.budget_bits", 0.0))


def compare(groups: list[Group], record: Mapping[str, Any], budget_bits: float) -> str:
    """Claimed primal, dual and gap against the recomputed ones."""
    price = Decimal(number(record["price"], "surrogate.price", 0.0))
    claimed = {name: Decimal(number(record[name], name)) for name in ("primal", "dual", "gap")}
    primal, used = primal_value(groups)
    budget = Decimal(budget_bits)
    if used > budget * (1 + SLACK):
        raise CheckError(f"the surrogate uses {float(used)} bits of {float(budget)}")
    dual = dual_value(groups, price, budget)
    slack = SLACK * (primal + price * (budget + used))
    if dual > primal + slack:
        raise CheckError("the surrogate's dual exceeds its primal")
    if claimed["primal"] < primal - slack:
        raise CheckError(f"surrogate primal {record['primal']!r} claimed, {float(primal)!r} found")
    if claimed["dual"] > dual + slack:
        raise CheckError(f"surrogate dual {record['dual']!r} is claimed, {float(dual)!r} found")
    if claimed["gap"] * primal < primal - dual - slack:
        gap = float((primal - dual) / primal)
        raise CheckError(f"surrogate gap {record['gap']!r} is claimed, {gap!r} found")
    return f"primal {float(primal):.9g}, dual {float(dual):.9g}, gap {record['gap']:.3g}"


def read_group(value: Any) -> Group:
    """One group of the record. Raises FormatError for numbers out of range."""
    record = table(value, GROUP_KEYS, "surrogate.groups")
    name = string(record["name"], "surrogate group")
    where = f"surrogate: {short(name)}"
    scale, decay = (Decimal(number(record[key], where)) for key in ("scale", "decay"))
    alpha = Decimal(number(record["alpha"], where, 0.0))
    low, high = numbers(record["bits"], where, 2)
    rho = numbers(record["factor_bits"], where)
    energy = numbers(record["log_energy"], where)
    rising = all(a < b for a, b in pairwise(rho))
    if scale <= 0 or decay <= 0 or not 0 <= low <= high or len(rho) != len(energy):
        raise FormatError(f"{where}: constants out of range")
    if not rho or rho[0] != 0 or not rising:
        raise FormatError(f"{where}: factor_bits must rise from 0")
    chosen = (
        Decimal(number(record["solution_bits"], where)),
        Decimal(number(record["solution_factor_bits"], where)),
    )
    start = alpha * scale * (energy[0] - decay * low).exp()
    weights = Decimal(natural(record["weights"], where))
    hull = tuple(lower_hull(list(zip(rho, energy, strict=True))))
    return Group(name, weights, start, decay, (low, high), hull, chosen)


def numbers(value: Any, where: str, count: int | None = None) -> list[Decimal]:
    found = [Decimal(number(item, where)) for item in listing(value, where)]
    if count is not None and len(found) != count:
        raise FormatError(f"{where}: {len(found)} numbers instead of {count}")
    return found


def lower_hull(points: Iterable[tuple[Decimal, Decimal]]) -> list[tuple[Decimal, Decimal]]:
    """Vertices of the lower convex envelope of points with rising abscissae."""
    hull: list[tuple[Decimal, Decimal]] = []
    for x, u in points:
        while len(hull) > 1:
            (x0, u0), (x1, u1) = hull[-2:]
            if (u1 - u0) * (x - x0) < (u - u0) * (x1 - x0):
                break
            hull.pop()
        hull.append((x, u))
    return hull


def primal_value(groups: list[Group]) -> tuple[Decimal, Decimal]:
    """sum alpha exp(v) at the chosen points, and sum p (b + rho)."""
    total = used = ZERO
    for group in groups:
        (b, rho), (low, high), last = group.chosen, group.bits, group.hull[-1][0]
        inside = low - SLACK <= b <= high + SLACK and -SLACK <= rho <= last + SLACK
        if not inside:
            raise CheckError(f"surrogate: {short(group.name)} lies outside its box")
        b, rho = min(max(b, low), high), min(max(rho, ZERO), last)
        fall = envelope(group, rho) - group.hull[0][1] - group.decay * (b - low)
        total += group.start * fall.exp()
        used += group.weights * (b + rho)
    return total, used


def envelope(group: Group, rho: Decimal) -> Decimal:
    """psi(rho)."""
    for (x, u), (y, v) in pairwise(group.hull):
        if rho <= y:
            return u + (v - u) * (rho - x) / (y - x)
    return group.hull[-1][1]


def dual_value(groups: list[Group], price: Decimal, budget: Decimal) -> Decimal:
    """Lower bound of every allocation within the budget."""
    total = -price * budget
    for group in groups:
        rate = price * group.weights
        total += rate * group.bits[0] + tangent_bound(group.start, rate, group.segments)
    return total


def tangent_bound(
    start: Decimal, rate: Decimal, segments: list[tuple[Decimal, Decimal]]
) -> Decimal:
    """A lower bound of min over 0 <= x_j <= w_j of A exp(-sum s_j x_j) + rate sum x_j."""
    level, taken = start, []
    for slope, width in segments:
        x = ZERO
        if level > 0 and level * slope > rate:
            x = width if rate == 0 else min(width, (level * slope / rate).ln() / slope)
        taken.append(x)
        level *= (-slope * x).exp()
    total = level + rate * sum(taken, ZERO)
    for (slope, width), x in zip(segments, taken, strict=True):
        tilt = rate - slope * level
        total += min(tilt * (width - x), -tilt * x)
    return total
