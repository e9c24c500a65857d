"""Every layer's low-rank program: constants, primal and dual value recomputed with error bounds.

    min over Z, R   1/2 tr((W - Z - R) H (W - Z - R)^T) + mu ||Z||_* + lambda ||R||_F^2 / kappa

is the program of program.py with c = 0 and the bits fixed, so that s = lambda / kappa. A record
holds Z as factors in float16; the rest of the point is rebuilt here in doubles, and *then* taken
as exact, since any will do:

    E0 = 2 s (W - Z) (2 s I + H)^-1,   R = W - Z - E0,      Y = E0 H = U diag(sigma) V^T,
    E = E0 - U diag(w) U^T E0,         w = 1 - mu / sigma for the leading rank(Z) values and all
                                       others above mu, else 0.

The constants follow from the certificate: docs/certificate.md, section 6.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convex_caldera.certify.program import ProgramBounds, check_program
from convex_caldera.certify.strict import natural, number, short, table
from convex_caldera.errors import CheckError, FormatError

Floats = NDArray[np.float64]
KEYS = (
    "rank",
    "factor_bits",
    "ridge",
    "lam",
    "kappa",
    "mu",
    "primal",
    "dual",
    "gap",
    "factors",
)
LAM = 0.5
RIDGE_SHARE = 0.01
MOST_FACTOR_BITS = 16
CLOSE = 1e-9  # relative, of constants that others computed in doubles too
LEAST_RAISED = 0.5  # share of mu below which a singular value is left alone


def check_layer_program(
    name: str, record: Any, W: Floats, H: Floats, loss: float, price: float
) -> ProgramBounds | None:
    """Recompute one layer's program.

    Args:
        record: of the certificate, or None.
        W, H: (m, n) and (n, n), undamped.
        loss: of the layer, in the unit of tr(E H E^T).
        price: of the plan, in that unit a bit.

    Returns:
        The values, or None where the record is None because loss or price is zero.

    Raises:
        FormatError, CheckError: as `check_program`; also where constants do not follow.
    """
    where = f"{short(name)}: program"
    energy = float(np.square(W).sum())
    if not (loss > 0 and price > 0 and energy > 0):
        if record is not None:
            raise CheckError(f"{where}: a program is stated where nothing costs anything")
        return None
    row = table(record, KEYS, where)
    rank = natural(row["rank"], f"{where}: rank", min(W.shape))
    bits = natural(row["factor_bits"], f"{where}: factor_bits", MOST_FACTOR_BITS)
    found = {key: number(row[key], f"{where}: {key}", 0.0) for key in ("ridge", "kappa", "mu")}
    s = LAM * loss / energy
    expected = {
        "ridge": RIDGE_SHARE * float(np.diag(H).mean()),
        "kappa": energy / loss,
        "mu": 2 * math.sqrt(s * 0.5 * price * sum(W.shape) * bits),
    }
    for key, value in expected.items():
        if not abs(found[key] - value) <= CLOSE * value:
            raise CheckError(f"{where}: {key} {found[key]!r} is claimed, {value!r} follows")
    if row["lam"] != LAM:
        raise CheckError(f"{where}: lam {short(row['lam'])}, not {LAM}")
    damped = 0.5 * (H + H.T) + found["ridge"] * np.eye(len(H))
    left, right = _factors(row["factors"], rank, W.shape, where)
    tensors = _point(name, W, damped, left, right, LAM / found["kappa"], found["mu"])
    return check_program(_full(name, row, W.shape), tensors, {name: W}, {name: damped})


def _factors(text: Any, rank: int, shape: tuple[int, ...], where: str) -> tuple[Floats, Floats]:
    """left (m, r) and right (r, n) of base64: float16, little-endian, one after the other."""
    m, n = shape
    if not isinstance(text, str):
        raise FormatError(f"{where}: factors must be text")
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise FormatError(f"{where}: factors are not base64") from error
    if len(raw) != 2 * rank * (m + n):
        raise FormatError(f"{where}: {len(raw)} bytes of factors of rank {rank}")
    values = np.frombuffer(raw, dtype="<f2").astype(np.float64)
    if not np.isfinite(values).all():
        raise FormatError(f"{where}: factors are not finite")
    return values[: m * rank].reshape(m, rank), values[m * rank :].reshape(rank, n)


def _point(
    name: str, W: Floats, H: Floats, left: Floats, right: Floats, s: float, mu: float
) -> Mapping[str, Floats]:
    """The tensors that `check_program` asks for, rebuilt from Z."""
    rest = W - left @ right
    misfit = 2 * s * np.linalg.solve(H + 2 * s * np.eye(len(H)), rest.T).T
    vectors, weights = _correction(misfit @ H, left.shape[1], mu)
    return {
        f"{name}.left": left,
        f"{name}.right": right,
        f"{name}.misfit": misfit,
        f"{name}.dual_left": vectors,
        f"{name}.dual_weights": weights,
    }


def _correction(Y: Floats, rank: int, mu: float) -> tuple[Floats, Floats]:
    """Left singular vectors of Y whose values are to become mu, and 1 - mu / sigma of each."""
    tall = Y.shape[0] > Y.shape[1]
    squares, vectors = np.linalg.eigh(Y.T @ Y if tall else Y @ Y.T)
    sigma = np.sqrt(squares[::-1].clip(min=0.0))
    vectors = vectors[:, ::-1]
    leading = np.arange(len(sigma)) < rank
    change = (sigma > mu) | (leading & (sigma > LEAST_RAISED * mu))
    sigma, vectors = sigma[change], vectors[:, change]
    if tall:
        vectors = (Y @ vectors) / sigma
    return vectors, 1.0 - mu / sigma


def _full(name: str, row: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
    """The record in the form of the whole program: bits fixed, no floor, no budget."""
    fixed = {"c": 0.0, "k": 1.0, "p": 0.0, "b_min": 0.0, "b_max": 0.0, "bits": 0.0}
    group = {key: row[key] for key in ("rank", "mu", "lam", "kappa")}
    group |= {"name": name, "shape": list(shape), "dual_scale": 1.0, **fixed}
    group["multiplier"] = float(row["lam"] / row["kappa"])
    values = {key: row[key] for key in ("primal", "dual", "gap")}
    return {"form": "penalty", "budget": 0.0, "price": 0.0, **values, "groups": [group]}
