"""Heavy tails: whether whole numbers are distributed by a power law, and whether something else explains them as well.

The steps are those of Clauset, Shalizi and Newman 2009: the exponent by maximum likelihood, the beginning of the tail by the smallest
Kolmogorov-Smirnov distance, a goodness of fit by simulated data, and likelihood ratios to other distributions (Vuong 1989).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from niwaki.counter import key, uniform
from niwaki.errors import InputError

Numbers = NDArray[np.float64]

ALPHA = (1.001, 30.0)
"""Exponents among which the likeliest is searched."""

SMALLEST_TAIL = 50
"""Numbers that a tail must have at least, as a fit to fewer says little."""

_BERNOULLI = (1 / 12, -1 / 720, 1 / 30240, -1 / 1209600, 1 / 47900160, -691 / 1307674368000)
"""Even Bernoulli numbers, each divided by the factorial of its index."""

_DIRECT = 12


def hurwitz(s: Numbers | float, q: Numbers | float) -> Numbers:
    """Return the Hurwitz zeta function ``Σ_{k >= 0} (q + k)^-s`` for s > 1 (at most 30) and q >= 1, elementwise in float64.

    12 terms are added up, the others by the formula of Euler and Maclaurin.

    >>> bool(abs(hurwitz(2.0, 1.0) - math.pi**2 / 6) < 1e-14)
    True
    """
    s, q = np.broadcast_arrays(np.asarray(s, dtype=np.float64), np.asarray(q, dtype=np.float64))
    total: Numbers = ((q[..., None] + np.arange(_DIRECT)) ** -s[..., None]).sum(axis=-1)
    end = q + _DIRECT
    power = end**-s
    total = total + power * end / (s - 1) + power / 2
    factor = s * power / end
    for number, coefficient in enumerate(_BERNOULLI):
        total = total + coefficient * factor
        factor = factor * (s + 2 * number + 1) * (s + 2 * number + 2) / end**2
    return total


@dataclass(frozen=True)
class PowerLaw:
    """A tail ``p(x) = x^-alpha / ζ(alpha, smallest)`` for whole ``x >= smallest``.

    Attributes:
        alpha: the exponent.
        smallest: where the tail begins.
        tail: how many numbers it has.
        distance: largest difference between its cumulative distribution and that of the numbers (Kolmogorov-Smirnov).
    """

    alpha: float
    smallest: int
    tail: int
    distance: float


def fit(values: NDArray[np.int64]) -> PowerLaw:
    """Return the power law that fits the tail of positive whole numbers best; zeros are left aside.

    Of every beginning that leaves a tail of 50 numbers and two different ones, the exponent is the likeliest; the beginning is the one
    with the smallest distance.

    Raises:
        InputError: there are too few numbers, or all are alike.
    """
    values = np.sort(values[values > 0])
    unique, first = np.unique(values, return_index=True)
    tails = len(values) - first
    enough = (tails >= SMALLEST_TAIL) & (unique < unique[-1]) if len(unique) else np.zeros(0, dtype=bool)
    if not enough.any():
        raise InputError(f"power law: needs at least {SMALLEST_TAIL} positive numbers that are not all alike, got {len(values)}")
    begins, sizes, starts = unique[enough].astype(np.float64), tails[enough], first[enough]
    logs = np.log(values)
    means = np.cumsum(logs[::-1])[::-1][starts] / sizes
    alphas = _maximum(lambda alpha: -np.log(hurwitz(alpha, begins)) - alpha * means, *(np.full(len(begins), end) for end in ALPHA))
    after = np.append(first[1:], len(values))  # how many numbers are at most each of the different ones
    distances = []
    for alpha, begin, size, start in zip(alphas, begins, sizes, starts, strict=True):
        places = unique >= begin
        model = 1 - hurwitz(alpha, unique[places] + 1.0) / hurwitz(alpha, begin)
        distances.append(float(np.abs((after[places] - start) / size - model).max()))
    best = int(np.argmin(distances))
    return PowerLaw(float(alphas[best]), int(begins[best]), int(sizes[best]), distances[best])


def plausibility(values: NDArray[np.int64], law: PowerLaw, samples: int, seed: int) -> float:
    """Return the share of simulated data that are farther from their own best power law than the numbers are from ``law``.

    Each sample has as many numbers, in the tail by the law, below it drawn from those that are there. Below 0.1 the law is ruled out.
    """
    values = values[values > 0]
    below, farther = values[values < law.smallest], 0
    for sample in range(samples):
        chance, place = (uniform(key(seed, sample, what), 0, len(values)).numpy() for what in ("tail", "number"))
        drawn = draw_from(law, place)
        if len(below):
            drawn = np.where(chance < law.tail / len(values), drawn, below[(place * len(below)).astype(np.int64)])
        farther += fit(drawn).distance >= law.distance
    return farther / samples


def draw_from(law: PowerLaw, chances: Numbers) -> NDArray[np.int64]:
    """Return the numbers of a power law at which the share of smaller ones is just at most ``1 - u``, for u = 1 - chances in (0, 1].

    That is the largest x with ``P(X >= x) >= u``: found by doubling, and halving what lies between; at most 2^40.
    """
    u, total = 1 - chances, hurwitz(law.alpha, float(law.smallest))
    low = np.full(len(u), float(law.smallest))
    high = 2 * low
    while (far := (hurwitz(law.alpha, high) / total >= u) & (high < 2**40)).any():
        low, high = np.where(far, high, low), np.where(far, 2 * high, high)
    while (high - low > 1).any():
        middle = np.floor((low + high) / 2)
        reached = hurwitz(law.alpha, middle) / total >= u
        low, high = np.where(reached, middle, low), np.where(reached, high, middle)
    return low.astype(np.int64)


# -- other distributions of the same tail ------------------------------------------------------------------------------------------


def log_power(x: Numbers, law: PowerLaw) -> Numbers:
    """Return the logarithm of each number's probability by the power law."""
    found: Numbers = -law.alpha * np.log(x) - np.log(hurwitz(law.alpha, float(law.smallest)))
    return found


def log_exponential(x: Numbers, smallest: int) -> Numbers:
    """Return the same by the likeliest exponential: ``(1 - r) r^(x - smallest)``, ``r = m / (1 + m)``, m the mean of x - smallest."""
    over = x - smallest
    mean = float(over.mean())
    found: Numbers = over * math.log(mean / (1 + mean)) - math.log1p(mean)
    return found


def log_poisson(x: Numbers, smallest: int) -> Numbers:
    """Return the same by the likeliest Poisson distribution of numbers from ``smallest`` on."""
    support = np.arange(smallest, int(x.max() + 20 * math.sqrt(x.max()) + 100), dtype=np.float64)
    factorial = np.array([math.lgamma(value + 1) for value in support])

    def log(values: Numbers, rate: Numbers) -> Numbers:
        every = support * np.log(rate)[..., None] - factorial  # of the whole tail, less the rate, which cancels
        top = every.max(axis=-1)
        whole = top + np.log(np.exp(every - top[..., None]).sum(axis=-1))
        found: Numbers = values * np.log(rate) - whole
        return found

    rate = _maximum(lambda rate: log(np.asarray(x.mean()), rate), np.array([1e-6]), np.array([float(x.max()) + 1]))
    probability: Numbers = log(x, rate) - factorial[(x - smallest).astype(np.int64)]
    return probability


OTHERS: Mapping[str, Callable[[Numbers, int], Numbers]] = {"exponential": log_exponential, "poisson": log_poisson}
"""Distributions that a power law is compared with."""


def compare(values: NDArray[np.int64], law: PowerLaw, other: str) -> tuple[float, float]:
    """Return how much likelier the power law makes the tail than another distribution, and the p-value of that.

    The first is the sum of the logarithms' differences over its standard deviation, positive where the power law is better; the second
    the probability of one so far from zero if both were equally good: ``erfc(|R| / sqrt(2))`` (Vuong 1989). Equal ones are (0, 1).
    """
    tail = values[values >= law.smallest].astype(np.float64)
    differences = log_power(tail, law) - OTHERS[other](tail, law.smallest)
    deviation = float(differences.std())
    if deviation == 0:
        return 0.0, 1.0
    ratio = float(differences.sum()) / (deviation * math.sqrt(len(tail)))
    return ratio, math.erfc(abs(ratio) / math.sqrt(2))


def _maximum(function: Callable[[Numbers], Numbers], low: Numbers, high: Numbers) -> Numbers:
    """Return where functions of one hump are largest, elementwise between two ends (golden section, Kiefer 1953)."""
    golden = (math.sqrt(5) - 1) / 2
    for _ in range(45):
        left, right = high - golden * (high - low), low + golden * (high - low)
        rises = function(left) < function(right)
        low, high = np.where(rises, left, low), np.where(rises, high, right)
    return (low + high) / 2
