"""The scalars of the convex program for given low-rank matrices: price, multipliers, bits.

Fix Z_g and let a_j be the squared column norms of W - Z in the eigenbasis of H (eigenvalues h_j).
What is left to choose is R, q and b; by duality it is

    F = max over nu >= 0, 0 <= s_g <= lambda_g / kappa_g  of
        sum_g  1/2 sum_j a_j 2 s h_j / (2 s + h_j)
             + min_b [ (lambda - kappa s) c e^{-k b} + nu p b ]  -  nu B ,

one root per group inside one root in nu. Stationarity in s and b reads

    x(s) = ||R||^2 = sum_j a_j (h_j / (2 s + h_j))^2
         = kappa clip( nu p / (k t), c e^{-k b_max}, c e^{-k b_min} ),     t = lambda - kappa s.

The unknown is y = t / kappa = lambda / kappa - s, which keeps its digits where s saturates: the
left side rises with y, the right side falls. b_g(nu) falls with nu.

Called twice per accelerated step, so compiled; written as plain loops, which are also its
reference (`numba` only speeds them up). tests/oracles/convex_program.py has an independent one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numba
import numpy as np

from convex_caldera.allocate.menu import Floats

NEWTON_STEPS = 200  # about six are used; the bracket halves in the worst case
PRICE_STEPS = 300
ROOT_TOLERANCE = 1e-15  # relative step of y
PRICE_TOLERANCE = 1e-15  # relative width of the bracket of log nu
TINY = 1e-300


@dataclass(frozen=True, eq=False)
class Rates:
    """Constants of the groups, each (G,), eigenvalues padded with zeros to (G, n_max)."""

    lam: Floats
    kappa: Floats
    c: Floats
    k: Floats
    p: Floats
    b_min: Floats
    b_max: Floats
    budget: float
    h: Floats

    def table(self) -> Floats:
        """(7, G) for the compiled loops."""
        return np.stack([self.lam, self.kappa, self.c, self.k, self.p, self.b_min, self.b_max])

    def distortion(self, bits: Floats) -> Floats:
        """c exp(-k b)."""
        return self.c * np.exp(-self.k * bits)


@dataclass(frozen=True, eq=False)
class Settled:
    """The maximisers: price nu, multipliers s, feasible bits b, and energies x = ||R||^2."""

    price: float
    s: Floats
    bits: Floats
    energy: Floats


def settle(rates: Rates, a: Floats, near: float = 0.0) -> Settled:
    """Solve the scalar problem for column energies a (G, n_max); `near` is a guess of the price.

    Where the price is zero the bits are the fewest among the optimal ones.
    Cost: about eight prices, each about six passes over `a`.
    """
    price, s, bits, energy = _settle(rates.table(), rates.budget, a, rates.h, near)
    return Settled(price, s, bits, energy)


def saturation(rates: Rates, s: Floats) -> Floats:
    """h / (2 s + h), 0 where h = 0: the share of W - Z that goes to R, (G, n_max)."""
    total = 2.0 * s[:, None] + rates.h
    return np.divide(rates.h, total, out=np.zeros_like(total), where=rates.h > 0)


def rate_value(rates: Rates, s: Floats, price: float) -> Floats:
    """min over b in [b_min, b_max] of (lambda - kappa s) c e^{-k b} + nu p b, per group.

    The function is convex in b, so its least value over the box is at the clipped stationary
    point; evaluating it at a slightly wrong b would overstate the minimum only to second order.
    """
    t = np.maximum(rates.lam - rates.kappa * s, 0.0) * rates.c
    slope = price * rates.p
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        b = np.log(t * rates.k / slope) / rates.k
    b = np.where(slope > 0, b, np.where(t > 0, np.inf, -np.inf))
    b = np.clip(b, rates.b_min, rates.b_max)
    return t * np.exp(-rates.k * b) + slope * b


@numba.njit(cache=True)
def _energy(a, h, s):  # type: ignore[no-untyped-def]
    """x(s) and -dx/ds = 4 sum a h^2 / (2 s + h)^3."""
    x = fall = 0.0
    for j in range(len(h)):
        if h[j] > 0.0:
            total = 2.0 * s + h[j]
            part = a[j] * (h[j] / total) ** 2
            x += part
            fall += part / total
    return x, 4.0 * fall


@numba.njit(cache=True)
def _root(a, h, most, slope, low, high, lower, upper):  # type: ignore[no-untyped-def]
    """y in [lower, upper] where x(most - y) = clip(slope / y, low, high); Newton in log y."""
    y = upper
    for _ in range(NEWTON_STEPS):
        x, fall = _energy(a, h, max(most - y, 0.0))
        target, tilt = min(max(slope / y, low), high), 0.0
        if low < slope / y < high:
            tilt = 1.0
        if x >= target:
            upper = y
        if x <= target:
            lower = y
        if x > TINY and target > TINY:
            tilt += y * fall / x
        after = 0.5 * (lower + upper)
        if lower > 0.0 and upper > 4.0 * lower:
            after = math.sqrt(lower * upper)
        if tilt > 0.0 and x > TINY and target > TINY:
            newton = y * math.exp(min(max(math.log(target / x) / tilt, -50.0), 50.0))
            if lower < newton < upper:
                after = newton
        done = abs(after - y) <= ROOT_TOLERANCE * y or upper - lower <= ROOT_TOLERANCE * upper
        y = after
        if done:
            break
    return y


@numba.njit(cache=True)
def _at_price(table, a, h, nu, s, bits, energy):  # type: ignore[no-untyped-def]
    """Fill s, bits, energy per group at price nu; returns sum p b."""
    used = 0.0
    for g in range(table.shape[1]):
        lam, kappa, c, k, p, b_min, b_max = table[:, g]
        most, slope = lam / kappa, nu * p / k
        low, high = kappa * c * math.exp(-k * b_max), kappa * c * math.exp(-k * b_min)
        x, _ = _energy(a[g], h[g], most)
        # Saturated (t = 0): even at b_min (nu > 0) or b_max (nu = 0) the residual binds q.
        y = 0.0
        if most > 0.0 and x < (high if slope > 0.0 else low):
            start, end = min(slope / high, most), most
            x, _ = _energy(a[g], h[g], most - start)
            if x > high:  # more than q allows where b leaves b_min: b = b_min at the root
                start, end = 0.0, start
            y = _root(a[g], h[g], most, slope, low, high, start, end)
            x, _ = _energy(a[g], h[g], max(most - y, 0.0))
        s[g], energy[g] = max(most - y, 0.0), x
        if lam * c == 0.0:
            b = b_min
        elif y >= most and slope > 0.0:
            b = math.log(lam * c / slope) / k  # R is free: only the price limits the bits
        elif y >= most or x <= TINY:
            b = b_max
        else:
            b = math.log(kappa * c / x) / k  # kappa c e^{-k b} = ||R||^2
        bits[g] = min(max(b, b_min), b_max)
        used += p * bits[g]
    return used


@numba.njit(cache=True)
def _settle(table, budget, a, h, near):  # type: ignore[no-untyped-def]
    groups = table.shape[1]
    s, bits, energy = np.empty(groups), np.empty(groups), np.empty(groups)
    if _at_price(table, a, h, 0.0, s, bits, energy) <= budget:
        return 0.0, s, bits, energy
    top = 0.0  # the price at which every group is at b_min
    for g in range(groups):
        lam, _, c, k, p, b_min, _ = table[:, g]
        if p > 0.0:
            top = max(top, k * c * math.exp(-k * b_min) * lam / p)
    top = math.log(top) + 1e-9
    high, width = top, 1.0
    if near > 0.0 and math.log(near) < top:
        high, width = math.log(near), 1e-4
    f_high = _at_price(table, a, h, math.exp(high), s, bits, energy) - budget
    low, f_low = high, f_high
    while f_low <= 0.0:
        high, f_high = low, f_low
        low, width = low - width, 4.0 * width
        f_low = _at_price(table, a, h, math.exp(low), s, bits, energy) - budget
    while f_high > 0.0:
        low, f_low = high, f_high
        high, width = min(high + width, top), 4.0 * width
        f_high = _at_price(table, a, h, math.exp(high), s, bits, energy) - budget
        if high >= top:
            f_high = min(f_high, 0.0)
    held = 0
    for step in range(PRICE_STEPS):  # false position (Illinois), every fourth step halves
        if high - low <= PRICE_TOLERANCE * max(1.0, abs(high)) or f_high == 0.0:
            break
        middle = (low * f_high - high * f_low) / (f_high - f_low)
        if step % 4 == 3 or not low < middle < high:
            middle = 0.5 * (low + high)
        if not low < middle < high:
            break
        value = _at_price(table, a, h, math.exp(middle), s, bits, energy) - budget
        if value > 0.0:
            low, f_low = middle, value
            f_high = 0.5 * f_high if held == 1 else f_high
            held = 1
        else:
            high, f_high = middle, value
            f_low = 0.5 * f_low if held == -1 else f_low
            held = -1
    price = math.exp(high)
    _at_price(table, a, h, price, s, bits, energy)
    return price, s, bits, energy
