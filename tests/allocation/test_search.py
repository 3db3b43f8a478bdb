"""Allocations that measure the loss: sensitivity scan, evolution and the agent."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from niwaki.allocation import Amc, Evidence, Evolutionary, Layer, Sensitivity, Uniform
from niwaki.errors import InputError
from niwaki.layout import Layout


def linear(name, pieces):
    return Layer(name, Layout(("output", "input"), (1, pieces)), pieces)


def separable(sizes, strengths):
    """Loss ``sum c_l (N_l / n_l)``: least where ``n_l`` grows with ``sqrt(c_l N_l)``."""
    return lambda counts: sum(c * size / max(n, 0.1) for c, size, n in zip(strengths, sizes, counts, strict=True))


def best_of(sizes, strengths, total):
    """The least loss that real numbers can have, by the condition of Lagrange without limits."""
    roots = np.sqrt(np.array(strengths) * np.array(sizes))
    counts = roots / roots.sum() * total
    return counts if (counts <= np.array(sizes)).all() else None


SEARCHES = [Evolutionary(population=12, generations=8), Amc(episodes=60, explore=20)]


@pytest.mark.parametrize("allocation", SEARCHES, ids=lambda one: one.name)
@pytest.mark.parametrize(("sizes", "strengths"), [([400, 400, 400], [1.0, 4.0, 16.0]), ([100, 900, 300, 50], [1.0, 0.5, 2.0, 1.0])])
def test_searches_come_closer_to_the_optimum_than_uniform(allocation, sizes, strengths):
    layers, loss = [linear(str(i), n) for i, n in enumerate(sizes)], separable(sizes, strengths)
    total = round(0.2 * sum(sizes))
    keep = allocation.keep(0.8, layers, evidence=Evidence(loss=loss, seed=3))
    assert sum(keep) == total
    optimum = best_of(sizes, strengths, total)
    assert optimum is not None
    least, uniform = loss(optimum), loss(Uniform().keep(0.8, layers))
    assert least - 1e-9 <= loss(keep) < least + 0.35 * (uniform - least)


@settings(max_examples=15)
@given(
    st.lists(st.integers(1, 200), min_size=1, max_size=5), st.floats(0.0, 0.98), st.integers(0, 3), st.sampled_from(["evolutionary", "amc"])
)
def test_searches_meet_the_total_and_are_never_worse_than_uniform(sizes, sparsity, seed, name):
    allocation = Evolutionary(population=4, generations=2) if name == "evolutionary" else Amc(episodes=4, explore=2)
    layers = [linear(str(i), n) for i, n in enumerate(sizes)]
    loss = separable(sizes, [1.0 + i for i in range(len(sizes))])
    state = torch.random.get_rng_state()
    keep = allocation.keep(sparsity, layers, evidence=Evidence(loss=loss, seed=seed))
    assert sum(keep) == round((1 - sparsity) * sum(sizes))
    assert loss(keep) <= loss(Uniform().keep(sparsity, layers)) + 1e-12
    assert keep == allocation.keep(sparsity, layers, evidence=Evidence(loss=loss, seed=seed))  # the seed decides
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("allocation", SEARCHES, ids=lambda one: one.name)
def test_losses_that_are_not_finite_lose(allocation):
    layers = [linear("a", 100), linear("b", 100)]
    keep = allocation.keep(0.5, layers, evidence=Evidence(loss=lambda counts: math.nan if counts[0] >= 50 else 100.0 - counts[0]))
    assert keep[0] < 50
    with pytest.raises(InputError, match="the loss was not finite in any of"):
        allocation.keep(0.5, layers, evidence=Evidence(loss=lambda counts: math.nan))


def test_the_agent_learns_without_gradients_being_recorded():
    layers = [linear("a", 100), linear("b", 100)]
    loss = separable([100, 100], [1.0, 9.0])
    with torch.no_grad():
        assert sum(Amc(episodes=30, explore=5).keep(0.6, layers, evidence=Evidence(loss=loss))) == 80


# --- sensitivity


def test_sensitivity_gives_all_layers_the_same_increase():
    sizes, slopes = [1000, 1000, 2000], [1.0, 2.0, 5.0]
    layers = [linear(str(i), n) for i, n in enumerate(sizes)]

    def loss(counts):  # linear, so interpolation is exact
        return 0.7 + sum(c * (1 - n / size) for c, size, n in zip(slopes, sizes, counts, strict=True))

    keep = Sensitivity().keep(0.4, layers, evidence=Evidence(loss=loss))
    # d such that 1000 d + 500 d + 400 d = 1600: 0.842.
    d = 1600 / 1900
    assert keep == pytest.approx([1000 * (1 - d), 1000 * (1 - d / 2), 2000 * (1 - d / 5)], abs=1.0)
    assert sum(keep) == 2400
    # Where one is worn out (here at sparsity 1, but for a piece) the others bear more.
    keep = Sensitivity().keep(0.6, layers, evidence=Evidence(loss=loss))
    d = 1400 / 900
    assert keep == pytest.approx([1, 1000 * (1 - d / 2), 2000 * (1 - d / 5)], abs=2.0)
    assert sum(keep) == 1600


def test_sensitivity_prunes_first_what_costs_nothing():
    layers = [linear("a", 100), linear("b", 100)]
    notes = []
    evidence = Evidence(loss=lambda counts: (100 - counts[1]) / 100, tell=notes.append)
    assert Sensitivity().keep(0.3, layers, evidence=evidence) == [40, 100]
    assert notes == ["sensitivity: of 2 layers a bears most (density 0.4), and b least (1)"]


@given(st.lists(st.tuples(st.integers(1, 300), st.floats(0.0, 5.0)), min_size=1, max_size=5), st.floats(0.01, 0.99))
def test_sensitivity_totals_are_exact(sets, sparsity):
    sizes = [n for n, _ in sets]
    layers = [linear(str(i), n) for i, n in enumerate(sizes)]
    evidence = Evidence(loss=lambda counts: sum(c * (1 - n / size) ** 2 for (size, c), n in zip(sets, counts, strict=True)))
    assert sum(Sensitivity(sparsities=[0.3, 0.6, 0.9]).keep(sparsity, layers, evidence=evidence)) == round((1 - sparsity) * sum(sizes))


def test_curves_tell_what_was_measured():
    layers = [linear("a", 10), linear("b", 100)]
    seen = []

    def loss(counts):
        seen.append(list(counts))
        return {1: 9.0, 5: 2.0}.get(counts[0], 3.0) if counts[0] < 10 else (math.inf if counts[1] < 5 else 1.0)

    curves = Sensitivity(sparsities=[0.2, 0.5]).curves(layers, Evidence(loss=loss))
    assert seen == [[10, 100], [8, 100], [5, 100], [1, 100], [10, 80], [10, 50], [10, 1]]
    assert np.array(curves["a"]) == pytest.approx(np.array([(0.0, 0.0), (0.2, 2.0), (0.5, 2.0), (0.9, 8.0)]))  # never falls
    assert np.array(curves["b"]) == pytest.approx(np.array([(0.0, 0.0), (0.2, 0.0), (0.5, 0.0), (0.99, math.inf)]))


def test_sensitivity_tells_when_it_goes_beyond_what_was_finite():
    layers = [linear("a", 100), linear("b", 100)]
    notes = []
    evidence = Evidence(loss=lambda counts: math.inf if min(counts) < 50 else 1.0, tell=notes.append)
    assert Sensitivity().keep(0.8, layers, evidence=evidence) == [20, 20]
    assert notes == ["sensitivity: the loss is finite for no budgets so small; all layers are cut beyond that by the same factor"]
    with pytest.raises(InputError, match="the loss is nan before anything is pruned"):
        Sensitivity().keep(0.5, layers, evidence=Evidence(loss=lambda counts: math.nan))
