"""Paley matrices by the words of the rule "hadamard-v1", slowly and without numpy.

Polynomials are tuples of coefficients, lowest power first; irreducible means not a product.
"""

from __future__ import annotations

from itertools import product

Polynomial = tuple[int, ...]


def multiply(a: Polynomial, b: Polynomial, r: int) -> Polynomial:
    out = [0] * (len(a) + len(b) - 1)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            out[i + j] = (out[i + j] + x * y) % r
    return tuple(out)


def monic(degree: int, r: int) -> list[Polynomial]:
    """All monic polynomials of a degree, by increasing number sum_j c_j r^j."""
    return [(*reversed(high_first), 1) for high_first in product(range(r), repeat=degree)]


def first_irreducible(r: int, k: int) -> Polynomial:
    products = {
        multiply(f, g, r)
        for d in range(1, k // 2 + 1)
        for f in monic(d, r)
        for g in monic(k - d, r)
    }
    return next(f for f in monic(k, r) if f not in products)


def jacobsthal(r: int, k: int) -> list[list[int]]:
    """Q[i][j] = chi(element i - element j) over GF(r^k)."""
    f = first_irreducible(r, k)
    elements = [tuple(reversed(high_first)) for high_first in product(range(r), repeat=k)]
    squares = {remainder(multiply(a, a, r), f, r) for a in elements if any(a)}

    def chi(a: Polynomial) -> int:
        return 0 if not any(a) else 1 if a in squares else -1

    def minus(a: Polynomial, b: Polynomial) -> Polynomial:
        return tuple((x - y) % r for x, y in zip(a, b, strict=True))

    return [[chi(minus(a, b)) for b in elements] for a in elements]


def remainder(a: Polynomial, f: Polynomial, r: int) -> Polynomial:
    """a modulo the monic f, by schoolbook division."""
    rest, k = list(a), len(f) - 1
    while len(rest) > k:
        lead = rest.pop()
        for i in range(k):
            rest[len(rest) - k + i] = (rest[len(rest) - k + i] - lead * f[i]) % r
    return tuple(rest)


def paley1(r: int, k: int) -> list[list[int]]:
    """I + [[0, 1^T], [-1, Q]]."""
    Q = jacobsthal(r, k)
    S = [[0] + [1] * len(Q)] + [[-1, *row] for row in Q]
    return [[x + (i == j) for j, x in enumerate(row)] for i, row in enumerate(S)]


def paley2(r: int, k: int) -> list[list[int]]:
    """C kron [[1, 1], [1, -1]] + I kron [[1, -1], [-1, -1]], C = [[0, 1^T], [1, Q]]."""
    Q = jacobsthal(r, k)
    C = [[0] + [1] * len(Q)] + [[1, *row] for row in Q]
    blocks = {0: ((1, -1), (-1, -1)), 1: ((1, 1), (1, -1)), -1: ((-1, -1), (-1, 1))}
    return [[x for entry in row for x in blocks[entry][half]] for row in C for half in (0, 1)]
