"""How far a layer is from the reverse-waterfilling limit, in bits per weight.

For a Gaussian W with independent entries of variance s^2 under the metric O (x) H with
eigenvalues o_i h_j, no code of R bits per weight does better than

    D = sum_ij min(theta, s^2 o_i h_j),    R = 1/(mn) sum_ij max(0, 1/2 log2(s^2 o_i h_j / theta))

(reverse waterfilling; Cover and Thomas, theorem 10.3.3). The statement is conditional on that
model of W, which a random rotation makes plausible and does not prove; a layer with structure
that a low-rank term serves may even lie below it. It is a figure, not a bound.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def waterfilling_bits(
    variance: float, output: Floats | None, inputs: Floats, shape: tuple[int, int], loss: float
) -> float:
    """Least bits per weight at which the Gaussian model allows this loss.

    Args:
        variance: mean square of W.
        output: eigenvalues of O (m,), None for the identity.
        inputs: eigenvalues of H (n,).
        shape: (m, n).
        loss: tr(O E H E^T) that was reached.

    Returns:
        R(D = loss); infinity for a loss of 0, and 0 if the loss is not below that of W^ = 0.

    Cost: one sort of m n numbers, or of n if O is the identity.
    """
    m, n = shape
    h = np.clip(inputs, 0.0, None)
    if output is None:
        levels, repeats = variance * h, float(m)
    else:
        levels, repeats = variance * np.outer(np.clip(output, 0.0, None), h).ravel(), 1.0
    levels = np.sort(levels)
    total = repeats * float(levels.sum())
    if loss <= 0:
        return float("inf")
    if loss >= total:
        return 0.0
    theta = _water_level(levels, loss / repeats)
    above = levels[levels > theta]
    return repeats * float(0.5 * np.log2(above / theta).sum()) / (m * n)


def _water_level(levels: Floats, distortion: float) -> float:
    """theta with sum_k min(theta, level_k) = distortion; levels sorted, exact."""
    below = np.concatenate([[0.0], np.cumsum(levels)])
    count = len(levels)
    # With k levels under water: distortion = below[k] + (count - k) theta.
    reached = below[:-1] + (count - np.arange(count)) * levels
    k = int(np.searchsorted(reached, distortion))
    return (distortion - below[k]) / (count - k)
