"""Scores of what units do, against numpy on recorded activations."""

import math

import numpy as np
import pytest
import torch

from niwaki.component import build
from niwaki.errors import InputError
from niwaki.granularity import InputChannel
from niwaki.layout import Layout
from niwaki.pieces import Grid, Slices
from niwaki.saliency import ActivityVariance, Apoz, Contribution, Entropy, Observation
from niwaki.saliency.activity import entries
from niwaki.statistics import InputMean, InputResponses, InputSquare, InputVariance, InputZeros

LINEAR = Layout(("output", "input"), (4, 6))
CONVOLUTION = Layout(("output", "input", "kernel", "kernel"), (5, 3, 2, 2))


def recorded(*shape, seed=0):
    """Activations behind a ReLU."""
    return np.maximum(np.random.default_rng(seed).normal(size=shape), 0.0)


def view(values, layout=LINEAR):
    """What holds for each input, in the view."""
    return torch.tensor(values).view([n if r == "input" else 1 for r, n in zip(layout.roles, layout.shape, strict=True)])


def units(owner, layout=LINEAR):
    """Pieces of the inputs of a tensor: the unit that each belongs to."""
    count = max(owner) + 1
    places = torch.tensor([[i for i, unit in enumerate(owner) if unit == u] for u in range(count)])
    return Slices("w", layout.shape, layout.shape, 1, torch.arange(count), places)


FLATTENED = units([0, 1, 2, 0, 1, 2])  # three units of two positions each, positions outside


def by_unit(data):
    return [data[:, [u, u + 3]] for u in range(3)]


def test_apoz_is_the_share_of_zeros():
    data = recorded(40, 6)
    known = {InputZeros(): view((data == 0).mean(axis=0))}
    found = Apoz().score(Observation("w", torch.zeros(4, 6), statistics=known, layout=LINEAR), FLATTENED)
    assert found.tolist() == pytest.approx([1 - float((one == 0).mean()) for one in by_unit(data)], rel=1e-13)
    assert Apoz.of_units
    assert Apoz.scored_on == "inputs"


def test_variance_of_activations():
    data = recorded(40, 6)
    known = {InputVariance(): view(data.var(axis=0))}
    found = ActivityVariance().score(Observation("w", torch.zeros(4, 6), statistics=known, layout=LINEAR), FLATTENED)
    assert found.tolist() == pytest.approx([float(one.var(axis=0).mean()) for one in by_unit(data)], rel=1e-13)


def test_units_that_a_weight_does_not_read_score_zero():
    cut = Slices("w", (4, 6), (4, 6), 1, torch.arange(2), torch.tensor([[0, 1], [6, 6]]))  # 6: no entry
    known = {InputZeros(): torch.zeros(1, 6)}
    assert Apoz().score(Observation("w", torch.zeros(4, 6), statistics=known), cut).tolist() == [1.0, 0.0]


def test_scores_of_the_inputs_of_a_convolution():
    data = recorded(30, 3)
    known = {InputZeros(): view((data == 0).mean(axis=0), CONVOLUTION)}
    found = Apoz().score(Observation("w", torch.zeros(5, 3, 2, 2), statistics=known, layout=CONVOLUTION), Grid(InputChannel(), CONVOLUTION))
    assert found.flatten().tolist() == pytest.approx((data > 0).mean(axis=0).tolist())


# ------------------------------------------------------------------ entropy


@pytest.mark.parametrize("bins", [2, 7, 100])
def test_entropy_is_that_of_a_histogram(bins):
    data = np.random.default_rng(3).normal(size=(200, 6))
    known = {InputResponses(examples=512): torch.tensor(data)}
    found = Entropy(bins=bins).score(Observation("w", torch.zeros(4, 6), statistics=known, layout=LINEAR), FLATTENED)
    for score, one in zip(found.tolist(), by_unit(data), strict=True):
        counts, _ = np.histogram(one.mean(axis=1), bins=bins)
        share = counts[counts > 0] / counts.sum()
        assert score == pytest.approx(float(-(share * np.log(share)).sum()), rel=1e-12)


def test_entropy_of_constant_units_is_zero_and_of_spread_ones_largest():
    data = torch.stack([torch.full((64,), 0.3), torch.arange(64.0), torch.arange(64.0) * 1e-6], dim=1).repeat(1, 2)
    known = {InputResponses(examples=64): data}
    found = Entropy(bins=64, examples=64).score(Observation("w", torch.zeros(4, 6), statistics=known, layout=LINEAR), FLATTENED)
    assert found.tolist() == pytest.approx([0.0, math.log(64), math.log(64)])


def test_entropy_tells_nan():
    known = {InputResponses(examples=512): torch.full((3, 6), math.nan)}
    with pytest.raises(InputError, match="NaN"):
        Entropy().score(Observation("w", torch.zeros(4, 6), statistics=known, layout=LINEAR), FLATTENED)


# ------------------------------------------------------------------ contributions


def test_goodness_and_energy_are_sums_over_all_contributions():
    data, weight = recorded(40, 6), np.random.default_rng(1).normal(size=(4, 6))
    known = {InputSquare(): view((data**2).mean(axis=0)), InputMean(): view(data.mean(axis=0))}
    seen = Observation("w", torch.tensor(weight), statistics=known, layout=LINEAR)
    made = data[:, None, :] * weight  # examples, outputs, inputs
    goodness = [float((made[:, :, [u, u + 3]] ** 2).sum(axis=(1, 2)).mean()) for u in range(3)]
    energy = [abs(float(made[:, :, [u, u + 3]].sum(axis=(1, 2)).mean())) for u in range(3)]
    assert Contribution().score(seen, FLATTENED).tolist() == pytest.approx(goodness, rel=1e-12)
    assert Contribution(measure="energy").score(seen, FLATTENED).tolist() == pytest.approx(energy, rel=1e-12)
    assert build("saliency", {"contribution": "energy"}) == Contribution(measure="energy")


# ------------------------------------------------------------------ which inputs make a unit


@pytest.mark.parametrize(
    ("layout", "dim"),
    [
        (Layout(("output", "input"), (4, 6)), 1),
        (Layout(("input", "output"), (6, 4)), 0),
        (Layout(("output", "input", "kernel"), (2, 6, 3)), 1),
        (Layout(("stack", "output", "input"), (3, 2, 6)), 2),
    ],
)
def test_entries_of_units(layout, dim):
    shape = layout.shape
    places = torch.tensor([[1, 4], [0, 5]])
    cut = Slices("w", shape, shape, dim, torch.arange(2), places)
    found = entries(Observation("w", torch.zeros(shape), layout=layout), cut)
    assert found.tolist() == [[0, 0.5, 0, 0, 0.5, 0], [0.5, 0, 0, 0, 0, 0.5]]


def test_entries_of_different_numbers_are_told():
    cut = Slices("w", (4, 6), (4, 6), 1, torch.arange(2), torch.tensor([[0, 1], [2, 6]]))
    with pytest.raises(InputError, match="differ in size"):
        entries(Observation("w", torch.zeros(4, 6), layout=LINEAR), cut)
