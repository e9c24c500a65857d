"""The reverse-waterfilling rate of a layer, recomputed: bits per weight that a loss must cost.

If W had independent Gaussian entries of its own mean square v, no code of R bits a weight could
have a loss below D(R) under the metric O (x) H with eigenvalues o_i h_j, where

    D = sum min(theta, v o_i h_j),     R = 1 / (m n) sum max(0, 1/2 log2(v o_i h_j / theta)).

A claim about that model of W, not about W. Source: Cover and Thomas, theorem 10.3.3.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from convex_caldera.certify.statistics import Sides
from convex_caldera.certify.strict import number, short
from convex_caldera.errors import CheckError

Floats = NDArray[np.float64]
TOLERANCE = 1e-6  # bits a weight; eigenvalues differ between libraries in their last digits


def least_bits(W: Floats, sides: Sides, loss: float) -> float:
    """R at D = loss; 0 for a loss that W^ = 0 has too, infinity for none."""
    m, n = W.shape
    h, o = sides.eigenvalues
    levels = float(np.square(W).mean()) * (h if o is None else np.outer(o, h).ravel())
    copies = m if o is None else 1
    if loss <= 0:
        return math.inf
    if loss >= copies * levels.sum():
        return 0.0
    rising = np.sort(levels)
    count = len(rising)
    below = np.concatenate([[0.0], np.cumsum(rising)[:-1]])
    # D with the water exactly at level k; theta lies under the first one that is too much.
    reached = below + (count - np.arange(count)) * rising
    k = int(np.searchsorted(reached, loss / copies))
    theta = (loss / copies - below[k]) / (count - k)
    rate = 0.5 * float(np.log2(rising[k:] / theta).sum())
    return copies * rate / (m * n)


def check_distance(
    name: str, W: Floats, sides: Sides, bits: float, loss: float, gap: object
) -> None:
    """`gap_to_waterfilling_bits` = bits - R(loss); None makes no claim."""
    if gap is None:
        return
    claimed, found = number(gap, f"{short(name)}: gap"), bits - least_bits(W, sides, loss)
    if not abs(claimed - found) <= TOLERANCE * max(1.0, bits):
        raise CheckError(
            f"{short(name)}: {claimed!r} bits from waterfilling are claimed, {found!r} found"
        )
