"""Scores that compare responses, against numpy, brute force and scipy's QR with pivoting."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import linalg

from niwaki.component import build
from niwaki.errors import InputError
from niwaki.granularity import Element, InputChannel
from niwaki.layout import Layout
from niwaki.pieces import Grid, Slices
from niwaki.saliency import ConnectionCorrelation, Correlation, Observation, SubsetSelection
from niwaki.statistics import InputCovariance, InputResponses


def responses(units, examples=60, seed=0):
    generator = np.random.default_rng(seed)
    return generator.normal(size=(examples, units)) @ generator.normal(size=(units, units))


def seen_of(data, active=None, **more):
    layout = Layout(("output", "input"), (2, data.shape[1]))
    known = {InputCovariance(): torch.tensor(np.cov(data, rowvar=False, bias=True)), InputResponses(examples=512): torch.tensor(data)}
    seen = Observation("w", torch.zeros(layout.shape), layout=layout, statistics=known, active=active, **more)
    return seen, Grid(InputChannel(), layout)


def order(scores):
    """The units in the order in which they go."""
    return [int(i) for i in scores.flatten().argsort(stable=True)]


@pytest.mark.parametrize("seed", range(4))
def test_of_the_most_correlated_pair_the_one_goes_that_is_more_correlated_with_the_rest(seed):
    data = responses(7, seed=seed)
    related = np.abs(np.corrcoef(data, rowvar=False))
    left, expected = list(range(7)), []
    while len(left) > 1:
        i, j = max(itertools.combinations(left, 2), key=lambda pair: related[pair])
        gone = max((j, i), key=lambda u: round(sum(related[u, v] for v in left if v != u), 12))
        expected.append(gone)
        left.remove(gone)
    found = Correlation().score(*seen_of(data))
    assert order(found) == [*expected, *left]
    assert sorted(found.flatten().tolist()) == pytest.approx([(k + 1) / 7 for k in range(7)])


@pytest.mark.parametrize("seed", range(4))
def test_the_unit_with_the_largest_sum_of_correlations_goes(seed):
    data = responses(7, seed=seed)
    related = np.abs(np.corrcoef(data, rowvar=False))
    left, expected = list(range(7)), []
    while len(left) > 1:
        gone = max(left[::-1], key=lambda u: round(sum(related[u, v] for v in left if v != u), 12))
        expected.append(gone)
        left.remove(gone)
    assert order(Correlation(by="sum").score(*seen_of(data))) == [*expected, *left]
    assert build("saliency", {"correlation": "sum"}) == Correlation(by="sum")


def test_one_of_each_set_of_duplicates_is_left_and_constants_go_first():
    data = np.random.default_rng(1).normal(size=(60, 3))
    doubled = np.column_stack([data[:, 0], -2 * data[:, 0], np.full(60, 4.0), data[:, 1], data[:, 2], data[:, 1] + 7])
    for by in ("maximum", "sum"):
        gone = order(Correlation(by=by).score(*seen_of(doubled)))
        assert gone[0] == 2
        kept = set(gone[3:])
        assert len(kept & {0, 1}) == len(kept & {3, 5}) == 1
        assert 4 in kept


def test_masked_units_score_zero_and_are_not_compared_with():
    data = responses(5)
    data[:, 1] = data[:, 0]
    active = torch.ones(2, 5, dtype=torch.bool)
    active[:, 1] = False
    for component in (Correlation(), Correlation(by="sum"), SubsetSelection(), SubsetSelection(kernel="gaussian")):
        found = component.score(*seen_of(data, active)).flatten()
        assert found[1] == 0.0
        rest = component.score(*seen_of(data[:, [0, 2, 3, 4]]))
        assert [[0, 2, 3, 4][u] for u in order(rest)] == [u for u in order(found) if u != 1]


def test_units_of_several_entries_are_compared_by_their_means():
    data = responses(6)
    layout = Layout(("output", "input"), (2, 6))
    cut = Slices("w", (2, 6), (2, 6), 1, torch.arange(3), torch.tensor([[0, 3], [1, 4], [2, 5]]))
    known = {InputCovariance(): torch.tensor(np.cov(data, rowvar=False, bias=True))}
    found = Correlation().score(Observation("w", torch.zeros(2, 6), layout=layout, statistics=known), cut)
    means = (data[:, :3] + data[:, 3:]) / 2
    assert found.tolist() == Correlation().score(*seen_of(means)).flatten().tolist()


# ------------------------------------------------------------------ subsets


@pytest.mark.parametrize("seed", range(5))
def test_covariance_is_qr_with_pivoting_of_the_centred_responses(seed):
    data = responses(8, seed=seed)
    _, _, pivots = linalg.qr(data - data.mean(axis=0), pivoting=True, mode="economic")
    assert order(SubsetSelection().score(*seen_of(data)))[::-1] == pivots.tolist()


def test_beyond_the_rank_nothing_is_chosen():
    data = responses(3)
    data = np.column_stack([data, data @ np.ones(3), 2 * data[:, 0], np.ones(60)])
    kept = order(SubsetSelection().score(*seen_of(data)))[-3:]
    assert np.linalg.matrix_rank((data - data.mean(axis=0))[:, kept]) == 3


@pytest.mark.parametrize("seed", range(3))
def test_gaussian_maximizes_the_determinant_greedily(seed):
    data = responses(6, examples=12, seed=seed) * 0.3
    apart = np.array([[math.dist(a, b) ** 2 for b in data.T] for a in data.T])
    kernel = np.exp(-10 / 12 * apart) + 0.01 * np.eye(6)
    chosen: list[int] = []
    while len(chosen) < 6:
        rest = [u for u in range(6) if u not in chosen]
        chosen.append(max(rest, key=lambda u: np.linalg.det(kernel[np.ix_([*chosen, u], [*chosen, u])])))
    assert order(SubsetSelection(kernel="gaussian").score(*seen_of(data)))[::-1] == chosen


@pytest.mark.parametrize("component", [Correlation(), SubsetSelection(), SubsetSelection(kernel="gaussian")], ids=str)
def test_responses_that_are_not_finite_are_told(component):
    data = responses(4)
    data[3, 1] = np.nan
    with pytest.raises(InputError, match="not finite"):
        component.score(*seen_of(data))


# ------------------------------------------------------------------ connections


def test_connections_are_correlations_of_input_and_output():
    data, weight = responses(5, examples=200), np.random.default_rng(2).normal(size=(3, 5))
    made = data @ weight.T
    layout = Layout(("output", "input"), (3, 5))
    known = {InputCovariance(): torch.tensor(np.cov(data, rowvar=False, bias=True))}
    found = ConnectionCorrelation().score(Observation("w", torch.tensor(weight), layout=layout, statistics=known), Grid(Element(), layout))
    expected = [[abs(np.corrcoef(made[:, o], data[:, i])[0, 1]) for i in range(5)] for o in range(3)]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10)
    turned = Layout(("input", "output"), (5, 3))
    seen = Observation("w", torch.tensor(weight.T.copy()), layout=turned, statistics=known)
    np.testing.assert_allclose(ConnectionCorrelation().score(seen, Grid(Element(), turned)).numpy().T, expected, rtol=1e-10)


def test_constant_inputs_and_dead_outputs_are_unrelated_and_convolutions_refused():
    layout = Layout(("output", "input"), (2, 2))
    known = {InputCovariance(): torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64))}
    seen = Observation("w", torch.tensor([[2.0, 1.0], [0.0, 0.0]]), layout=layout, statistics=known)
    assert ConnectionCorrelation().score(seen, Grid(Element(), layout)).tolist() == [[1.0, 0.0], [0.0, 0.0]]
    layout = Layout(("output", "input", "kernel"), (2, 2, 3))
    with pytest.raises(InputError, match="conv is a convolution"):
        ConnectionCorrelation().score(Observation("conv", torch.zeros(2, 2, 3), layout=layout), Grid(Element(), layout))
