"""The convex program of low rank and bits: a rigorous primal and dual value of its certificate.

    minimise   sum_g 1/2 tr((W-Z-R) H (W-Z-R)^T) + mu_g ||Z_g||_* + lambda_g q_g
    subject to ||R_g||_F^2 <= kappa_g q_g,  q_g >= c_g e^{-k_g b_g},  b in its box,  sum p b <= B

or with ||Z||_* <= tau. For any matrices E, any nu >= 0 and 0 <= s <= lambda / kappa, with Y = E H,

    sum_g <Y, W> - 1/2 <Y, E> - ||Y||_F^2 / (4 s) + min_b [ (lambda - kappa s) c e^{-kb} + nu p b ]
    - nu B  <=  optimum,     provided ||Y||_2 <= mu   (constrained: minus tau ||Y||_2).

E = scale (E0 - A diag(w) A^T E0), E0 = W - Z - R, is computed in doubles and *then* taken as exact:
any E will do. The primal point likewise is the one whose residual is the computed E0; what that
moves R by is added to its norm. So only products with H, sums and one spectral norm carry rounding
errors, all bounded in rounding.py. E is scaled down if its norm exceeds mu. H is shifted by a few
units of its own rounding until it is proved positive semidefinite, in both values alike.

Source: docs/certificate.md, section 5. Nothing of the solver is used.
"""

from __future__ import annotations

import decimal
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convex_caldera.certify.rounding import (
    UNIT,
    gamma,
    inner_product,
    is_semidefinite,
    norm_above,
    product_error,
    spectral_norm_above,
)
from convex_caldera.certify.strict import listing, natural, number, short, string, table
from convex_caldera.certify.surrogate import CONTEXT, tangent_bound
from convex_caldera.errors import CheckError, FormatError

Floats = NDArray[np.float64]
KEYS = ("form", "budget", "price", "primal", "dual", "gap", "groups")
CONSTANTS = ("lam", "kappa", "c", "k", "p", "b_min", "b_max", "bits", "multiplier", "dual_scale")
TENSORS = ("left", "right", "residual", "dual_left", "dual_weights")
FORMS = {"penalty": "mu", "constrained": "tau"}
# Of |primal|: what a solver's own doubles, and feasibility up to rounding, may amount to.
SLACK = 1e-7
FEASIBLE = Decimal("1e-9")
SHIFTS = 20


@dataclass(frozen=True)
class ProgramBounds:
    """The optimum lies in [dual, primal], rounding included; gap is (primal - dual) / |primal|."""

    primal: float
    dual: float
    gap: float


@dataclass(frozen=True, eq=False)
class _Group:
    name: str
    weight: Decimal  # mu or tau
    numbers: Mapping[str, Decimal]
    W: Floats
    H: Floats
    tensors: Mapping[str, Floats]


def check_program(
    record: Any,
    tensors: Mapping[str, Floats],
    weights: Mapping[str, Floats],
    hessians: Mapping[str, Floats],
) -> ProgramBounds:
    """Recompute both values of a program's record.

    Args:
        record: as `docs/certificate.md` section 5 lays it out.
        tensors: float64, "<name>.left" and so on; "<name>.misfit", E0, may stand in for
            "<name>.residual", which loses it where it is small.
        weights: W (m, n) of every group.
        hessians: H (n, n) of every group, the matrix that was solved under, damping included.

    Raises:
        FormatError: the record or a shape is malformed.
        CheckError: the point is infeasible, H has a negative eigenvalue, or a value flatters.

    Cost: six m x n x n products, two Cholesky factorizations and one symmetric eigenvalue problem
    of the smaller side per group.
    """
    table(record, KEYS, "program")
    if record["form"] not in tuple(FORMS):
        raise FormatError(f"program: form {short(record['form'])}")
    penalty = record["form"] == "penalty"
    with decimal.localcontext(CONTEXT):
        budget = Decimal(number(record["budget"], "program.budget"))
        price = Decimal(number(record["price"], "program.price", 0.0))
        primal, dual, used = Decimal(0), -price * budget, Decimal(0)
        for item in listing(record["groups"], "program.groups"):
            group = _read(item, FORMS[record["form"]], tensors, weights, hessians)
            used += group.numbers["p"] * group.numbers["bits"]
            above, below = _values(group, penalty, price)
            primal, dual = primal + above, dual + below
        if used > budget + FEASIBLE * abs(budget):
            raise CheckError(f"the program uses {float(used)} of {float(budget)}")
        return _compare(record, float(primal), float(dual))


def _compare(record: Mapping[str, Any], primal: float, dual: float) -> ProgramBounds:
    size = max(abs(primal), 1e-300)
    slack = SLACK * size
    if dual > primal + slack:
        raise CheckError("the dual value exceeds the primal value")
    gap = max(primal - dual, 0.0) / size
    if number(record["primal"], "program.primal") < primal - slack:
        raise CheckError(f"primal {record['primal']!r} is claimed, {primal!r} found")
    if number(record["dual"], "program.dual") > dual + slack:
        raise CheckError(f"dual {record['dual']!r} is claimed, {dual!r} found")
    if number(record["gap"], "program.gap", 0.0) < gap - SLACK:
        raise CheckError(f"gap {record['gap']!r} is claimed, {gap!r} found")
    return ProgramBounds(primal, dual, gap)


def _read(
    item: Any,
    weight: str,
    tensors: Mapping[str, Floats],
    weights: Mapping[str, Floats],
    hessians: Mapping[str, Floats],
) -> _Group:
    row = table(item, ("name", "shape", "rank", weight, *CONSTANTS), "program group")
    name = string(row["name"], "program group")
    where = f"program: {short(name)}"
    rank = natural(row["rank"], f"{where}: rank")
    numbers = {key: Decimal(number(row[key], f"{where}: {key}", 0.0)) for key in CONSTANTS}
    if numbers["kappa"] == 0 or numbers["k"] == 0:
        raise FormatError(f"{where}: kappa and k must be positive")
    if not numbers["b_min"] <= numbers["bits"] <= numbers["b_max"]:
        raise CheckError(f"{where}: the bits lie outside their box")
    if name not in weights or name not in hessians:
        raise FormatError(f"{where}: no such weight or Hessian")
    found = {}
    m, n = weights[name].shape
    k = len(tensors[f"{name}.dual_weights"]) if f"{name}.dual_weights" in tensors else 0
    shapes = ((m, rank), (rank, n), (m, n), (m, k), (k,))
    given = dict(zip(TENSORS, shapes, strict=True))
    if f"{name}.misfit" in tensors:
        given["misfit"] = given.pop("residual")
    for key, shape in given.items():
        value = tensors.get(f"{name}.{key}")
        if value is None or value.shape != shape or not np.isfinite(value).all():
            raise FormatError(f"{where}: {key} must be finite and {shape}")
        found[key] = value.astype(np.float64)
    if row["shape"] != [m, n] or hessians[name].shape != (n, n):
        raise FormatError(f"{where}: shapes differ from the weight's")
    H = proved_semidefinite(hessians[name].astype(np.float64), where)
    W = weights[name].astype(np.float64)
    return _Group(name, Decimal(number(row[weight], where, 0.0)), numbers, W, H, found)


def proved_semidefinite(H: Floats, where: str) -> Floats:
    """H plus the least shift, of the order of rounding, under which it is proved semidefinite."""
    H = 0.5 * (H + H.T)
    trace = float(np.diag(H).sum())
    shift = 0.0 if trace > 0 else 1e-300
    for attempt in range(SHIFTS):
        shifted = H + shift * np.eye(len(H))
        if is_semidefinite(shifted) or not H.any():
            return shifted
        shift = 2.0**attempt * len(H) * UNIT * trace
        if shift > 1e-8 * trace:
            break
    raise CheckError(f"{where}: H is not positive semidefinite")


def _values(group: _Group, penalty: bool, price: Decimal) -> tuple[Decimal, Decimal]:
    """A number above the group's share of the primal value, and one below of the dual's."""
    left, right = group.tensors["left"], group.tensors["right"]
    rest = group.W - left @ right
    if "misfit" in group.tensors:
        E0 = group.tensors["misfit"]
        R = rest - E0
    else:
        R = group.tensors["residual"]
        E0 = rest - R
    moved = gamma(left.shape[1]) * norm_above(left) * norm_above(right)
    moved += 2 * UNIT * (norm_above(rest) + norm_above(E0) + norm_above(R))
    above = _primal(group, penalty, E0, norm_above(R) + moved)
    A, w = group.tensors["dual_left"], group.tensors["dual_weights"]
    E = float(group.numbers["dual_scale"]) * (E0 - A @ (w[:, None] * (A.T @ E0)))
    return above, _dual(group, penalty, E, price)


def _primal(group: _Group, penalty: bool, E0: Floats, residual: float) -> Decimal:
    x, H = group.numbers, group.H
    weighted = E0 @ H
    value, error = inner_product(weighted, E0)
    misfit = Decimal(value) + Decimal(error) + Decimal(product_error(E0, H) * norm_above(E0))
    norms = (Decimal(norm_above(group.tensors[side])) for side in ("left", "right"))
    nuclear = sum((norm * norm for norm in norms), Decimal(0)) / 2
    if not penalty and nuclear > group.weight * (1 + FEASIBLE):
        raise CheckError(f"program: {short(group.name)}: nuclear norm {float(nuclear)} above tau")
    q = max(Decimal(residual) ** 2 / x["kappa"], x["c"] * (-x["k"] * x["bits"]).exp())
    return misfit / 2 + (group.weight * nuclear if penalty else Decimal(0)) + x["lam"] * q


def _dual(group: _Group, penalty: bool, E: Floats, price: Decimal) -> Decimal:
    x, W, H = group.numbers, group.W, group.H
    s = min(x["multiplier"], x["lam"] / x["kappa"])
    rate = price * x["p"]
    start = max(x["lam"] - x["kappa"] * s, Decimal(0)) * x["c"] * (-x["k"] * x["b_min"]).exp()
    width = x["b_max"] - x["b_min"]
    total = rate * x["b_min"] + tangent_bound(start, rate, [(x["k"], width)])
    Y = E @ H
    wrong = product_error(E, H)
    if s == 0 or not Y.any():
        return total  # E = 0 is always allowed
    along, error = inner_product(Y, W)
    linear = Decimal(along) - Decimal(error) - Decimal(wrong * norm_above(W))
    inner, error = inner_product(Y, E)
    curved = Decimal(inner) + Decimal(error) + Decimal(wrong * norm_above(E))
    square = curved / 2 + (Decimal(norm_above(Y)) + Decimal(wrong)) ** 2 / (4 * s)
    norm = Decimal(spectral_norm_above(Y)) + Decimal(wrong)
    if not penalty:
        return total + max(linear - group.weight * norm - square, Decimal(0))
    scale = min(Decimal(1), group.weight / norm)
    return total + max(scale * linear - scale * scale * square, Decimal(0))
