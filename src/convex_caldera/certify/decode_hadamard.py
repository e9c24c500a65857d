"""Randomized rotations under the rule "hadamard-v1", rebuilt from the order alone.

W was stored as W' = T_m diag(out) W diag(in) T_n^T; so W = diag(out) T_m^T W' T_n diag(in), signs
one bit a channel, set for -1, least significant bit first.

T_n, with n = K 2^p and K odd: Sylvester over sqrt(n) if K = 1; else for b = K 2^t, t = 2 .. p,
b <= 1024, the first t with Paley I of q = b - 1, or else Paley II of q = b / 2 - 1 = 1 mod 4
(q a prime power), times Sylvester; else the Hartley matrix of order K times Sylvester.

    Paley I:   B = I + [[0, 1^T], [-1, Q]]
    Paley II:  B = [[0, 1^T], [1, Q]] kron [[1, 1], [1, -1]] + I kron [[1, -1], [-1, -1]]
    Q[i, j] = chi(element i - element j) over GF(q); the digits of i in base r, least significant
    first, are the coefficients of element i, products are reduced by the monic irreducible
    polynomial of least number.

Sources: Sylvester 1867; Paley, J. Math. Phys. 12 (1933); Hartley, Proc. IRE 30 (1942).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from itertools import product

import numpy as np
from numpy.typing import NDArray

from convex_caldera.certify.codec import Array, Layout, Record, Shape, TransformFormat, boolean
from convex_caldera.errors import FormatError

Floats = NDArray[np.float64]
PALEY_CAP = 1024


def layout(record: Record, shape: Shape) -> Layout:
    sides = (("input_signs", shape[1], "inputs"), ("output_signs", shape[0], "outputs"))
    return {name: ("U8", (-(-size // 8),)) for name, size, wanted in sides if record[wanted]}


def invert(record: Record, W: Floats, tensors: Mapping[str, Array]) -> Floats:
    if not (record["inputs"] or record["outputs"]):
        raise FormatError("a rotation of neither side")
    if record["inputs"]:
        W = rotate_back(W) * signs(tensors["input_signs"], W.shape[1])
    if record["outputs"]:
        W = (rotate_back(W.T) * signs(tensors["output_signs"], W.shape[0])).T
    return W


def signs(packed: Array, size: int) -> Floats:
    """(size,) of +-1."""
    bits = np.unpackbits(packed, bitorder="little").astype(np.float64)
    if bits[size:].any():
        raise FormatError(f"signs are set beyond the {size} channels")
    return 1.0 - 2.0 * bits[:size]


def rotate_back(W: Floats) -> Floats:
    """T_n^T along the last axis of W (rows, n): butterflies, then the transposed base matrix."""
    rows, n = W.shape
    base = base_matrix(n)
    order = 1 if base is None else len(base)
    y = W.reshape(rows * order, n // order)
    span = 1
    while span < y.shape[1]:
        pairs = y.reshape(len(y), -1, 2, span)
        upper, lower = pairs[:, :, 0], pairs[:, :, 1]
        y = np.stack([upper + lower, upper - lower], axis=2).reshape(y.shape)
        span *= 2
    y = y.reshape(rows, order, n // order) / math.sqrt(n // order)
    if base is not None:
        y = np.einsum("uv,ruj->rvj", base, y, optimize=True)
    return y.reshape(rows, n)


@lru_cache(maxsize=8)
def base_matrix(n: int) -> Floats | None:
    """The orthonormal matrix that is not Sylvester's, or None where there is none."""
    odd = n // (n & -n)
    if odd == 1:
        return None
    order = 4 * odd
    while n % order == 0 and order <= PALEY_CAP:
        if prime_base(order - 1):
            return _paley1(order - 1) / math.sqrt(order)
        half = order // 2 - 1
        if half % 4 == 1 and prime_base(half):
            return _paley2(half) / math.sqrt(order)
        order *= 2
    i = np.arange(odd)
    angle = 2 * np.pi * (np.outer(i, i) % odd) / odd
    hartley: Floats = (np.cos(angle) + np.sin(angle)) / math.sqrt(odd)
    return hartley


def prime_base(q: int) -> int:
    """The prime of which q > 1 is a power, or 0."""
    prime = next((d for d in range(2, math.isqrt(q) + 1) if q % d == 0), q)
    while q % prime == 0:
        q //= prime
    return prime if q == 1 else 0


def _paley1(q: int) -> Floats:
    B = np.eye(q + 1)
    B[0, 1:] = 1
    B[1:, 0] = -1
    B[1:, 1:] += _jacobsthal(q)
    return B


def _paley2(q: int) -> Floats:
    C = np.zeros((q + 1, q + 1))
    C[0, 1:] = C[1:, 0] = 1
    C[1:, 1:] = _jacobsthal(q)
    one, two = np.array([[1.0, 1.0], [1.0, -1.0]]), np.array([[1.0, -1.0], [-1.0, -1.0]])
    return np.kron(C, one) + np.kron(np.eye(q + 1), two)


def _jacobsthal(q: int) -> Floats:
    """chi(element i - element j)."""
    r = prime_base(q)
    degree = round(math.log(q, r))
    elements = [tuple(i // r**k % r for k in range(degree)) for i in range(q)]
    number = {element: i for i, element in enumerate(elements)}
    modulus = _least_irreducible(r, degree)
    chi = np.full(q, -1.0)
    for element in elements:
        chi[number[_reduced(_product(element, element), modulus, r)]] = 1.0
    chi[0] = 0.0
    digits = np.array(elements)
    place = r ** np.arange(degree)
    return np.stack([chi[(row - digits) % r @ place] for row in digits])


def _least_irreducible(r: int, degree: int) -> tuple[int, ...]:
    """Coefficients c_0 .. c_(k-1): the first monic polynomial that is no product of two."""
    reducible = set()
    for low in range(1, degree // 2 + 1):
        for f in product(range(r), repeat=low):
            for g in product(range(r), repeat=degree - low):
                both = _product((*f, 1), (*g, 1))
                reducible.add(tuple(c % r for c in both[:-1]))
    for number in range(r**degree):
        candidate = tuple(number // r**k % r for k in range(degree))
        if candidate not in reducible:
            return candidate
    raise FormatError(f"no irreducible polynomial of degree {degree} over GF({r})")


def _product(f: tuple[int, ...], g: tuple[int, ...]) -> list[int]:
    out = [0] * (len(f) + len(g) - 1)
    for i, a in enumerate(f):
        for j, b in enumerate(g):
            out[i + j] += a * b
    return out


def _reduced(f: list[int], modulus: tuple[int, ...], r: int) -> tuple[int, ...]:
    """f modulo x^k + c_(k-1) x^(k-1) + ... + c_0, coefficients modulo r."""
    degree = len(modulus)
    for top in range(len(f) - 1, degree - 1, -1):
        lead, f[top] = f[top], 0
        for k, c in enumerate(modulus):
            f[top - degree + k] -= lead * c
    return tuple(c % r for c in f[:degree])


FORMAT = TransformFormat({"inputs": boolean, "outputs": boolean}, layout, invert)
