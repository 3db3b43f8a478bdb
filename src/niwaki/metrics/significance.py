"""Whether two groups of numbers differ by more than chance explains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, variance

_TINY = 1e-300
_ROUNDING = 1e-12  # a relative spread this small is no spread, but the rounding of equal numbers


def welch(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Return the two-sided p-value of Welch's t-test: the probability of so large a difference of means if both groups had the same mean.

    ``t = (mean_1 - mean_2) / sqrt(v_1 + v_2)`` with ``v_i = variance_i / n_i`` follows Student's t distribution with
    ``(v_1 + v_2)² / (v_1² / (n_1 - 1) + v_2² / (n_2 - 1))`` degrees of freedom, approximately. The groups may have different variances.

    None where there is nothing to test with: fewer than two numbers in a group, or no spread in either.

    Source: Welch 1947.

    >>> round(welch([0.90, 0.91, 0.92], [0.80, 0.82, 0.81]), 6)
    0.000255
    """
    if min(len(first), len(second)) < 2:
        return None
    v, w = variance(first) / len(first), variance(second) / len(second)
    if math.sqrt(v + w) <= _ROUNDING * max(map(abs, [*first, *second])):
        return None
    freedom = (v + w) ** 2 / (v**2 / (len(first) - 1) + w**2 / (len(second) - 1))
    return student_two_sided((fmean(first) - fmean(second)) / math.sqrt(v + w), freedom)


def paired_interval(first: Sequence[float], second: Sequence[float], level: float = 0.95) -> tuple[float, float | None]:
    """Return the mean of ``first - second``, pair by pair, and half the width of its confidence interval by Student's t distribution.

    ``half = t s / sqrt(n)`` with s the standard deviation of the n differences and ``P(|T| >= t) = 1 - level`` at ``n - 1`` degrees of
    freedom. It is None for a single pair.

    Args:
        first: at least one number.
        second: as many.
        level: in (0, 1).

    Source: Student 1908.

    >>> mean, half = paired_interval([3.0, 5.0], [2.0, 2.0], level=0.5)
    >>> round(mean, 9), round(half, 9)  # t = 1 at one degree of freedom, s = sqrt(2)
    (2.0, 1.0)
    """
    differences = [a - b for a, b in zip(first, second, strict=True)]
    n = len(differences)
    if n < 2:
        return fmean(differences), None
    low, high = 0.0, 1.0
    while student_two_sided(high, n - 1) > 1 - level:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if student_two_sided(middle, n - 1) > 1 - level else (low, middle)
    return fmean(differences), high * math.sqrt(variance(differences) / n)


def student_two_sided(t: float, freedom: float) -> float:
    """Return ``P(|T| >= |t|)`` for T of Student's t distribution: ``I_x(freedom / 2, 1 / 2)`` at ``x = freedom / (freedom + t²)``.

    >>> round(student_two_sided(1.0, 1.0), 12)  # 1 - 2 arctan(1) / pi
    0.5
    """
    square = t * t
    if square < 1:  # the same from the other end, where freedom / (freedom + t²) would be rounded to 1
        return 1 - incomplete_beta(0.5, freedom / 2, square / (freedom + square))
    return incomplete_beta(freedom / 2, 0.5, freedom / (freedom + square))


def incomplete_beta(a: float, b: float, x: float) -> float:
    """Return the regularized incomplete beta function ``I_x(a, b)`` for a, b > 0 and x in [0, 1], to about 9 digits.

    The continued fraction of Abramowitz & Stegun 1964, 26.5.8, which converges fast for ``x < (a + 1) / (a + b + 2)``; beyond that,
    ``I_x(a, b) = 1 - I_{1-x}(b, a)``. Evaluated by the method of Lentz 1976.
    """
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - incomplete_beta(b, a, 1 - x)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)) / a
    fraction, c, d = 1.0, 1.0, 0.0
    for i in range(10_000):
        m = i // 2
        if i == 0:
            step = 1.0
        elif i % 2:
            step = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            step = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        d = 1 / (1 + step * d or _TINY)
        c = 1 + step / c or _TINY
        fraction *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return min(1.0, front * (fraction - 1))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return p-values adjusted for having made several tests: of the i-th smallest of n, ``max over j <= i of min(1, (n - j + 1) p_j)``.

    Rejecting where the adjusted value is at most 0.05 makes even one false rejection at most 5 % likely. None stays None, uncounted.

    Source: Holm 1979.

    >>> holm([0.01, None, 0.04, 0.03])
    [0.03, None, 0.06, 0.06]
    """
    order = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(order):
        largest = adjusted[i] = max(largest, min(1.0, (len(order) - rank) * p))
    return adjusted
