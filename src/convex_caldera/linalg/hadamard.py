"""Orthogonal transform of any order n with flat entries: Hadamard where one is known.

Rule "hadamard-v1". It is part of the file format and may never change; a reader must rebuild
the same matrix T_n (n, n) from n alone. Write n = K 2^p with K odd. All indices start at 0.

1.  Sylvester: S(1) = [1], S(2k) = [[S, S], [S, -S]]; that is S[i, j] = (-1)^popcount(i & j).
2.  K = 1: T = S(2^p) / sqrt(n).
3.  K > 1: for t = 2, 3, ... while t <= p and b = K 2^t <= 1024, take the first t for which
    (a) q = b - 1 is a prime power (then q = 3 mod 4): B = Paley I of q; or else
    (b) q = b / 2 - 1 is a prime power with q = 1 mod 4: B = Paley II of q.
    (a) is tried before (b) for each t. Then T = (B kron S(2^(p - t))) / sqrt(n).
4.  No such t: T = C kron S(2^p) / sqrt(2^p), with the Hartley matrix of order K,
    C[i, j] = (cos a + sin a) / sqrt(K), a = 2 pi (i j mod K) / K. C is symmetric, C C = I.

Finite field GF(q), q = r^k, r prime: element number i has the digits of i in base r, least
significant first, as coefficients of 1, x, ..., x^(k-1). Products are taken modulo the monic
irreducible polynomial x^k + c_(k-1) x^(k-1) + ... + c_0 of least number sum_j c_j r^j.
chi(0) = 0, chi(a) = 1 if a is a nonzero square, else -1; Q[i, j] = chi(element i - element j).

    Paley I:   B = I + [[0, 1^T], [-1, Q]]                              order q + 1
    Paley II:  B = [[0, 1^T], [1, Q]] kron [[1, 1], [1, -1]]
                 + I kron [[1, -1], [-1, -1]]                           order 2 (q + 1)

The vector is indexed i = u 2^s + v for (B kron S(2^s)), u the row of B. `rotate` maps x to T x;
the inverse is T^T x, which differs for Paley I. Entries of T are +-1/sqrt(n) under rules 2 and
3 and at most sqrt(2 / n) under rule 4.

The cap of 1024 bounds the dense part of the work: beyond it the Hartley matrix of the odd part
is smaller and mixes nearly as well (13696 = 107 * 128 has no Paley matrix at all).

Sources: Sylvester 1867; Paley, J. Math. Phys. 12 (1933); Hartley, Proc. IRE 30 (1942); use for
weights: QuIP#, arXiv 2402.04396. Differs: no tables, and no order is refused.
"""

from __future__ import annotations

from functools import cache, lru_cache
from math import isqrt, sqrt
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from convex_caldera.errors import ShapeError

Kind = Literal["sylvester", "paley1", "paley2", "hartley"]

RULE = "hadamard-v1"
PALEY_CAP = 1024  # largest dense Paley order of the rule; part of the format
DENSE_SYLVESTER = 64  # largest Sylvester block applied as one matrix product; speed only


@cache
def base_order(n: int) -> tuple[Kind, int]:
    """Which matrix is kron-multiplied with a Sylvester one, and its order, by the rule above.

    Raises:
        ShapeError: n < 1.
    """
    if n < 1:
        raise ShapeError(f"a rotation needs at least one channel, got {n}")
    odd = n // (n & -n)
    if odd == 1:
        return "sylvester", 1
    order = 4 * odd
    while n % order == 0 and order <= PALEY_CAP:
        if _prime_power(order - 1):
            return "paley1", order
        if order // 2 % 4 == 2 and _prime_power(order // 2 - 1):
            return "paley2", order
        order *= 2
    return "hartley", odd


def base_matrix(n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The orthonormal base matrix of `base_order(n)`, (order, order); do not write to it."""
    kind, order = base_order(n)
    return _base_tensor(kind, order, dtype, torch.device("cpu"))


def rotate(x: Tensor, inverse: bool = False) -> Tensor:
    """T_n x (or T_n^T x) along the last axis of x (..., n); dtype and shape are kept.

    Half precision is computed in float32; differentiable; x is not written to.

    Raises:
        ShapeError: the last axis is empty.

    Cost: 2 n (b + sum of Sylvester block orders <= 64) flops a vector, b the base order, at
    matrix-product speed.
    """
    return _Rotation.apply(x, inverse)


class _Rotation(torch.autograd.Function):
    """The transpose takes gradients back: the same products, not one for every row of a batch."""

    @staticmethod
    def forward(context: Any, x: Tensor, inverse: bool) -> Tensor:
        context.inverse = inverse
        return _rotated(x, inverse)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return rotate(gradients[0], not context.inverse), None


def _rotated(x: Tensor, inverse: bool) -> Tensor:
    n = x.shape[-1] if x.dim() else 0
    kind, order = base_order(n)
    dtype = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
    y = _walsh_hadamard(x.to(dtype).contiguous().reshape(-1, order, n // order))
    if order > 1:
        B = _base_tensor(kind, order, dtype, x.device)
        y = torch.matmul(B.T if inverse else B, y)
    return y.reshape(x.shape).to(x.dtype)


def _walsh_hadamard(x: Tensor) -> Tensor:
    """x (rows, base, 2^s) times S(2^s) / sqrt(2^s) along the last axis.

    S(2^s) = S(2^a) kron S(2^b) kron ...: a matrix product for each factor on its own axis.
    """
    shape, length = x.shape, x.shape[-1]
    done = 1  # product of the orders already applied, from the least significant side
    for order in _sylvester_blocks(length):
        S = _sylvester_tensor(order, x.dtype, x.device)
        x = x.reshape(-1, order) @ S if done == 1 else S @ x.reshape(-1, order, done)
        done *= order
    return x.reshape(shape)


@cache
def _sylvester_blocks(length: int) -> tuple[int, ...]:
    """Orders, near equal and at most DENSE_SYLVESTER, whose product is `length`, a power of 2."""
    log, widest = length.bit_length() - 1, DENSE_SYLVESTER.bit_length() - 1
    parts = -(-log // widest)
    return tuple(2 ** (log // parts + (i < log % parts)) for i in range(parts))


@lru_cache(maxsize=32)
def _base_tensor(kind: Kind, order: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    # Outside inference mode, so that the cached matrix may later take part in training.
    with torch.inference_mode(False):
        return torch.from_numpy(_base_array(kind, order)).to(device, dtype)


@lru_cache(maxsize=64)
def _sylvester_tensor(order: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.from_numpy(sylvester(order) / sqrt(order)).to(device, dtype)


@lru_cache(maxsize=8)
def _base_array(kind: Kind, order: int) -> NDArray[np.float64]:
    if kind == "hartley":
        return hartley(order)
    if kind == "sylvester":
        return np.ones((1, 1))
    signs = paley1(order - 1) if kind == "paley1" else paley2(order // 2 - 1)
    return signs / sqrt(order)


def sylvester(order: int) -> NDArray[np.int64]:
    """S(order), entries +-1, order a power of two."""
    S = np.ones((1, 1), np.int64)
    while len(S) < order:
        S = np.block([[S, S], [S, -S]])
    return S


def hartley(order: int) -> NDArray[np.float64]:
    """Symmetric orthogonal (order, order) matrix of cas(2 pi i j / order) / sqrt(order)."""
    i = np.arange(order)
    angle = 2 * np.pi * (np.outer(i, i) % order) / order
    return (np.cos(angle) + np.sin(angle)) / sqrt(order)


def paley1(q: int) -> NDArray[np.int64]:
    """Hadamard matrix of order q + 1, q = 3 mod 4 a prime power."""
    S = _border(_jacobsthal(q))
    S[1:, 0] = -1
    return S + np.eye(q + 1, dtype=np.int64)


def paley2(q: int) -> NDArray[np.int64]:
    """Hadamard matrix of order 2 (q + 1), q = 1 mod 4 a prime power."""
    C = _border(_jacobsthal(q))
    identity = np.eye(q + 1, dtype=np.int64)
    return np.kron(C, [[1, 1], [1, -1]]) + np.kron(identity, [[1, -1], [-1, -1]])


def _border(Q: NDArray[np.int64]) -> NDArray[np.int64]:
    """[[0, 1^T], [1, Q]]."""
    C = np.ones((len(Q) + 1, len(Q) + 1), np.int64)
    C[0, 0] = 0
    C[1:, 1:] = Q
    return C


def _jacobsthal(q: int) -> NDArray[np.int64]:
    """Q[i, j] = chi(element i - element j) over GF(q)."""
    r = _characteristic(q)
    k = 1
    while r**k < q:
        k += 1
    digits = np.arange(q)[:, None] // r ** np.arange(k) % r  # (q, k)
    chi = np.full(q, -1, np.int64)
    chi[_squares(digits, r)] = 1
    chi[0] = 0
    difference = (digits[:, None, :] - digits[None, :, :]) % r
    return chi[difference @ r ** np.arange(k)]


def _squares(digits: NDArray[np.int64], r: int) -> NDArray[np.int64]:
    """Numbers of the squares of all elements, given as their digits (q, k) in base r."""
    q, k = digits.shape
    square = np.zeros((q, 2 * k - 1), np.int64)
    for i in range(k):
        for j in range(k):
            square[:, i + j] += digits[:, i] * digits[:, j]
    modulus = _least_irreducible(r, k)
    for power in range(2 * k - 2, k - 1, -1):  # x^k = -(c_0 + ... + c_(k-1) x^(k-1))
        square[:, power - k : power] -= square[:, power, None] * modulus
    return square[:, :k] % r @ r ** np.arange(k)


def _least_irreducible(r: int, k: int) -> NDArray[np.int64]:
    """c_0 .. c_(k-1) of the monic irreducible polynomial of degree k of least number."""
    for number in range(r**k):
        coefficients = number // r ** np.arange(k) % r
        if _irreducible(np.append(coefficients, 1), r):
            return coefficients
    raise ArithmeticError(f"no irreducible polynomial of degree {k} over GF({r})")


def _irreducible(f: NDArray[np.int64], r: int) -> bool:
    """Whether no monic polynomial of degree 1 .. deg f / 2 divides f over GF(r)."""
    degree = len(f) - 1
    for d in range(1, degree // 2 + 1):
        for number in range(r**d):
            divisor = np.append(number // r ** np.arange(d) % r, 1)
            rest = f.copy()
            for top in range(degree, d - 1, -1):
                rest[top - d : top + 1] -= rest[top] * divisor
                rest %= r
            if not rest.any():
                return False
    return True


def _prime_power(q: int) -> bool:
    r = _characteristic(q)
    while q % r == 0:
        q //= r
    return q == 1


def _characteristic(q: int) -> int:
    """The least prime factor of q > 1."""
    return next((d for d in range(2, isqrt(q) + 1) if q % d == 0), q)
