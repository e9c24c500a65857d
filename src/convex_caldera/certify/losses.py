"""Weighted errors recomputed from the stored codes, against those that are claimed.

    loss = tr(O (W - W^) H (W - W^)^T),   relative loss = loss / tr(O W H W^T),   undamped

W^ is decoded here in float64; the claim was made of a float32 decoder, whose rounding errors d
are noise of standard deviation at most

    sigma = u sqrt(K) * (sum of the norms of the terms) / sqrt(m n),      u = 2^-24,

K the additions behind one entry (terms, ranks, rotations). Then loss moves by 2 <O E H, d> plus
tr(O d H d^T): noise of deviation 2 sigma ||O E H||_F, and a mean of sigma^2 tr(O) tr(H). The
tolerance is eight deviations plus sixteen means, and 1e-12 of the energy for float64 itself. It
is a statement about rounding noise (Higham and Mary, SIAM J. Sci. Comput. 41 (2019)), not a
worst case: the worst case is thousands of times wider and would let altered codes pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convex_caldera.certify.decode_hadamard import base_matrix
from convex_caldera.certify.decode_layer import decode_with_norm
from convex_caldera.certify.reader import Layer
from convex_caldera.certify.statistics import Sides
from convex_caldera.certify.strict import number, short
from convex_caldera.errors import CheckError, FormatError

Floats = NDArray[np.float64]
UNIT = 2.0**-24
DEVIATIONS = 8.0
MEANS = 16.0
DOUBLE_SLACK = 1e-12
SYLVESTER_ADDITIONS = 64  # of one dense block; decoders may use butterflies, which have fewer


@dataclass(frozen=True)
class Loss:
    """Recomputed loss of a layer, its tolerance, and the energy tr(O W H W^T)."""

    loss: float
    tolerance: float
    energy: float


def recompute(layer: Layer, W: Floats, sides: Sides) -> Loss:
    """Decode a layer and weigh its error. Raises FormatError where shapes do not fit."""
    m, n = layer.spec.shape
    H, O = sides.H, sides.O
    fits = all(G.shape == (n, n) for _, G in sides.groups)
    fits = fits and H.shape == (n, n) and (O is None or O.shape == (m, m))
    if W.shape != (m, n) or not fits:
        raise FormatError(f"{short(layer.name)}: weight, statistics and layer differ in shape")
    W_hat, norm = decode_with_norm(layer)
    E = W - W_hat
    weighted = _weigh(E, sides)
    loss, energy = float((weighted * E).sum()), float((_weigh(W, sides) * W).sum())
    sigma = UNIT * math.sqrt(additions(layer) / (m * n)) * norm
    mean = sigma * sigma * float(np.trace(H)) * (m if O is None else float(np.trace(O)))
    noise = 2 * sigma * float(np.linalg.norm(weighted))
    tolerance = DEVIATIONS * noise + MEANS * mean + DOUBLE_SLACK * abs(energy)
    return Loss(loss, tolerance, energy)


def _weigh(E: Floats, sides: Sides) -> Floats:
    """O E H, or E_k H_k for every group of rows."""
    if sides.groups:
        return np.concatenate([E[rows] @ H for rows, H in sides.groups])
    product = E @ sides.H
    return product if sides.O is None else sides.O @ product


def additions(layer: Layer) -> int:
    """K: float32 additions that one entry of W^ goes through."""
    m, n = layer.spec.shape
    count = len(layer.spec.terms) + layer.spec.rank
    for transform in layer.spec.transforms:
        if transform.record["kind"] == "hadamard":
            for size, side in ((n, "inputs"), (m, "outputs")):
                count += _rotation_additions(size) if transform.record[side] else 0
        else:
            count += 1
    return count


def _rotation_additions(size: int) -> int:
    base = base_matrix(size)
    order = 1 if base is None else len(base)
    blocks = -(-((size // order).bit_length() - 1) // 6)
    return order + SYLVESTER_ADDITIONS * blocks


def check_loss(name: str, found: Loss, claimed: Mapping[str, Any]) -> None:
    """Claimed `loss` and `relative_loss` within the tolerance; CheckError otherwise."""
    loss = number(claimed.get("loss"), f"{short(name)}: loss")
    relative = number(claimed.get("relative_loss"), f"{short(name)}: relative_loss")
    if not abs(loss - found.loss) <= found.tolerance:
        value = f"{found.loss!r} +- {found.tolerance:.2g}"
        raise CheckError(f"{short(name)}: loss {loss!r} is claimed, {value} found")
    ratio = found.loss / found.energy if found.energy > 0 else float(found.loss > 0)
    share = found.tolerance / found.energy if found.energy > 0 else 0.0
    if not abs(relative - ratio) <= share + DOUBLE_SLACK * ratio:
        raise CheckError(f"{short(name)}: relative loss {relative!r} is claimed, {ratio!r} found")
