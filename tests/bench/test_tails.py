"""Tails of distributions: against scipy, brute force, and samples whose distribution is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from niwaki.bench.phenomena import tails
from niwaki.errors import InputError


@given(st.floats(1.001, 30), st.floats(1, 5000))
def test_the_zeta_function_equals_scipys(s: float, q: float) -> None:
    assert float(tails.hurwitz(s, q)) == pytest.approx(float(scipy.special.zeta(s, q)), rel=1e-12)


def test_the_zeta_function_is_elementwise() -> None:
    s, q = np.array([[2.0], [3.5]]), np.array([1.0, 7.0, 300.0])
    np.testing.assert_allclose(tails.hurwitz(s, q), scipy.special.zeta(s, q), rtol=1e-12)


def likeliest(tail: np.ndarray, begin: int) -> float:
    """The exponent that scipy finds."""

    def surprise(alpha: float) -> float:
        return float(alpha * np.log(tail).mean() + math.log(scipy.special.zeta(alpha, begin)))

    return float(scipy.optimize.minimize_scalar(surprise, bounds=(1.001, 30), method="bounded", options={"xatol": 1e-10}).x)


def brute(values: np.ndarray) -> tuple[float, int, int, float]:
    """The best power law, number by number."""
    best = (0.0, 0, 0, math.inf)
    for begin in sorted(set(values.tolist()) - {0, int(values.max())}):
        tail = values[values >= begin]
        if len(tail) < tails.SMALLEST_TAIL:
            continue
        alpha = likeliest(tail, begin)
        whole = float(scipy.special.zeta(alpha, begin))
        distance = max(abs((tail <= x).mean() - sum(k**-alpha for k in range(begin, x + 1)) / whole) for x in sorted(set(tail.tolist())))
        if distance < best[3]:
            best = (alpha, begin, len(tail), distance)
    return best


@pytest.mark.parametrize("seed", range(3))
def test_the_best_power_law_is_that_of_brute_force(seed: int) -> None:
    values = np.random.default_rng(seed).negative_binomial(2, 0.15, 300)
    alpha, begin, size, distance = brute(values)
    law = tails.fit(values)
    assert (law.smallest, law.tail) == (begin, size)
    assert law.alpha == pytest.approx(alpha, rel=1e-6)
    assert law.distance == pytest.approx(distance, rel=1e-6)


@pytest.mark.parametrize("alpha", [1.8, 2.5, 3.5])
def test_the_exponent_of_a_known_power_law_is_found(alpha: float) -> None:
    """Within four standard errors of the likeliest exponent from the known beginning (Clauset et al. 2009, equation 3.6)."""
    values = scipy.stats.zipf(alpha).rvs(4000, random_state=np.random.default_rng(0)).astype(np.int64)
    law = tails.fit(values)
    assert law.smallest <= 6
    h = 1e-3
    curvature = (math.log(scipy.special.zeta(alpha + h, 1)) - 2 * math.log(scipy.special.zeta(alpha, 1))) / h**2
    curvature += math.log(scipy.special.zeta(alpha - h, 1)) / h**2
    assert abs(law.alpha - alpha) < 4 / math.sqrt(law.tail * curvature) + 0.1 * (law.smallest > 1)
    ratio, p = tails.compare(values, law, "exponential")
    assert ratio > 2
    assert p < 0.05


def test_simulated_power_laws_are_plausible_and_others_are_not() -> None:
    generator = np.random.default_rng(1)
    power = scipy.stats.zipf(2.5).rvs(300, random_state=generator).astype(np.int64)
    assert tails.plausibility(power, tails.fit(power), 10, 0) >= 0.1
    geometric = generator.geometric(0.1, 800)
    law = tails.PowerLaw(likeliest(geometric, 1), 1, 800, 0.0)
    distance = max(
        abs((geometric <= x).mean() - 1 + scipy.special.zeta(law.alpha, x + 1) / scipy.special.zeta(law.alpha, 1)) for x in range(1, 200)
    )
    assert tails.plausibility(geometric, tails.PowerLaw(law.alpha, 1, 800, distance), 10, 0) == 0.0


def test_a_geometric_tail_is_told_from_a_power_law() -> None:
    values = np.random.default_rng(2).geometric(0.05, 3000)
    law = tails.PowerLaw(likeliest(values, 1), 1, 3000, 0.0)
    ratio, p = tails.compare(values, law, "exponential")
    assert ratio < -10
    assert p < 1e-10
    assert tails.compare(values, law, "poisson")[0] > 5  # whose tail is much too short


def test_a_poisson_tail_is_told_from_a_power_law() -> None:
    values = np.random.default_rng(3).poisson(20, 3000)
    law = tails.PowerLaw(likeliest(values[values >= 20], 20), 20, int((values >= 20).sum()), 0.0)
    ratio, p = tails.compare(values, law, "poisson")
    assert ratio < -5
    assert p < 1e-6


def test_likelihoods_are_those_of_scipys_distributions_at_their_maximum() -> None:
    generator = np.random.default_rng(4)
    tail = np.sort(generator.poisson(12, 400))[150:].astype(np.float64)
    begin = int(tail[0])

    def surprise_of_exponential(p: float) -> float:
        return -float(scipy.stats.geom(p, loc=begin - 1).logpmf(tail).sum())

    def surprise_of_poisson(rate: float) -> float:
        every = scipy.stats.poisson(rate)
        return -float((every.logpmf(tail) - every.logsf(begin - 1)).sum())

    found = scipy.optimize.minimize_scalar(surprise_of_exponential, bounds=(1e-6, 1), method="bounded", options={"xatol": 1e-12})
    assert tails.log_exponential(tail, begin).sum() == pytest.approx(-found.fun, rel=1e-9)
    found = scipy.optimize.minimize_scalar(surprise_of_poisson, bounds=(1e-3, 40), method="bounded", options={"xatol": 1e-12})
    assert tails.log_poisson(tail, begin).sum() == pytest.approx(-found.fun, rel=1e-9)
    law = tails.PowerLaw(2.5, begin, len(tail), 0.0)
    expected = np.log(tail**-2.5 / scipy.special.zeta(2.5, begin))
    np.testing.assert_allclose(tails.log_power(tail, law), expected, rtol=1e-12)


def test_the_likelihood_ratio_is_vuongs() -> None:
    values = np.random.default_rng(5).geometric(0.2, 200)
    law = tails.PowerLaw(2.0, 3, int((values >= 3).sum()), 0.0)
    tail = values[values >= 3].astype(np.float64)
    p = 1 / (1 + (tail - 3).mean())
    differences = np.log(tail**-2.0 / scipy.special.zeta(2.0, 3)) - scipy.stats.geom(p, loc=2).logpmf(tail)
    z = differences.mean() / (differences.std() / math.sqrt(len(tail)))
    ratio, chance = tails.compare(values, law, "exponential")
    assert ratio == pytest.approx(z, rel=1e-9)
    assert chance == pytest.approx(2 * scipy.stats.norm.sf(abs(z)), rel=1e-9)


@pytest.mark.parametrize(("alpha", "begin"), [(1.5, 1), (2.5, 4), (20.0, 30)])
def test_numbers_are_drawn_from_the_law(alpha: float, begin: int) -> None:
    law = tails.PowerLaw(alpha, begin, 1, 0.0)
    chances = np.array([0.0, 0.1, 0.5, 0.9, 0.99])
    drawn = tails.draw_from(law, chances)
    for u, x in zip(1 - chances, drawn.tolist(), strict=True):
        reach = scipy.special.zeta(alpha, [x, x + 1]) / scipy.special.zeta(alpha, begin)
        assert reach[1] < u <= reach[0] * (1 + 1e-12)


def test_too_few_numbers_are_refused() -> None:
    with pytest.raises(InputError, match="at least 50 positive numbers that are not all alike, got 49"):
        tails.fit(np.arange(0, 50))
    with pytest.raises(InputError, match="not all alike, got 80"):
        tails.fit(np.full(80, 3))
