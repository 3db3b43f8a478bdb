"""Coreset weights: exactly unbiased over all samples, and together with the saliency that draws them."""

import itertools
import math

import pytest
import torch
from compensation.networks import EXAMPLES, change, without
from torch import nn

from niwaki.compensation import Coreset, Removal
from niwaki.component import build
from niwaki.coresets import representation
from niwaki.errors import InputError
from niwaki.granularity import Element
from niwaki.pieces import Grid, Slices
from niwaki.saliency import Coreset as Drawn
from niwaki.saliency import GroupObservation, Observation


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def probability(likely, chosen):
    """Of drawing a set without replacement, in any order."""
    total = 0.0
    for order in itertools.permutations(chosen):
        one, left = 1.0, dict(enumerate(likely))
        for i in order:
            one /= math.fsum(left.values())
            one *= left.pop(i)
        total += one
    return total


@pytest.mark.parametrize("drawn", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("likely", [[1, 1, 1, 1, 1, 1], [0.4, 0.3, 0.15, 0.1, 0.04, 0.01], [1e6, 1, 1e-3, 1e-6, 5, 2]])
def test_weights_are_exactly_unbiased_over_all_samples(likely, drawn):
    expectation, values = 0.0, [3.0, -1.0, 2.0, 5.0, -7.0, 0.5]
    each = torch.zeros(6, dtype=torch.float64)
    for chosen in itertools.combinations(range(6), drawn):
        keep = torch.zeros(6, dtype=torch.bool)
        keep[list(chosen)] = True
        weights = representation(torch.tensor(likely, dtype=torch.float64), keep)
        assert (weights[~keep] == 1).all()
        each += probability(likely, chosen) * weights * keep
        expectation += probability(likely, chosen) * sum(float(weights[i]) * values[i] for i in chosen)
    assert each.tolist() == pytest.approx([1.0] * 6, rel=1e-9)
    assert expectation == pytest.approx(sum(values), rel=1e-8)


def test_weights_are_the_ratio_of_probabilities():
    likely = [0.4, 0.3, 0.15, 0.1, 0.05]
    keep = torch.tensor([True, False, True, True, False])
    weights = representation(torch.tensor(likely, dtype=torch.float64), keep)
    for j in (0, 2, 3):
        others = [i for i in (0, 2, 3) if i != j]
        first = probability([p for i, p in enumerate(likely) if i != j], [i - (i > j) for i in others])
        assert float(weights[j]) == pytest.approx(first / probability(likely, (0, 2, 3)), rel=1e-10)


def test_what_is_never_drawn_and_what_leaves_nothing_out():
    half = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64)
    assert representation(half, torch.tensor([True, True, False])).tolist() == [1, 1, 1]
    assert representation(half, torch.tensor([True, False, True])).tolist() == pytest.approx([2, 1, 1])
    assert representation(half, torch.tensor([True, True, True])).tolist() == [1, 1, 1]
    assert representation(half, torch.tensor([False, False, False])).tolist() == [1, 1, 1]


def test_many_likely_alike_count_about_their_share():
    keep = torch.arange(3000) % 3 == 0
    weights = representation(torch.ones(3000, dtype=torch.float64), keep)
    torch.testing.assert_close(weights[keep], torch.full((1000,), 3.0, dtype=torch.float64), rtol=1e-9, atol=0)


# ------------------------------------------------------------------ with the saliency that draws


def perceptron():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 7, dtype=torch.float64), nn.ReLU(), nn.Linear(7, 3, dtype=torch.float64))


def drawn_units(removal, bound, seed, sampled=True):
    """Scores of the saliency for the units of a removal."""
    members = []
    for (name, dim, shape, owner), of in ((removal.units[0].makers[0], "makes"), (removal.units[0].readers[0], "reads")):
        one = removal.changes[name]
        seen = Observation(name, one.weight, layout=one.layout, statistics=one.statistics if of == "reads" else {}, seed=seed)
        members.append([(seen, Slices(name, one.layout.shape, shape, dim, owner, owner[:, None]))])
    seen = GroupObservation(7, *members)
    return Drawn(bound=bound, examples=EXAMPLES, sampled=sampled).score_group(seen)


@pytest.mark.parametrize("bound", ["norm", "data"])
def test_the_expectation_over_all_samples_of_units_is_the_layer_itself(bound):
    model, data = perceptron(), normal(EXAMPLES, 4)
    likely = drawn_units(without(model, [0], data), bound, 0, sampled=False).exp().tolist()
    assert max(likely) > 2 * min(likely)
    expectation = torch.zeros(3, 7, dtype=torch.float64)
    for stay in itertools.combinations(range(7), 4):
        removal = without(model, [u for u in range(7) if u not in stay], data)
        found = Coreset(bound=bound, examples=EXAMPLES).compensate(removal)
        assert set(found) == {"2.weight"}
        expectation += probability(likely, stay) * (found["2.weight"] * removal.changes["2.weight"].keep)
    torch.testing.assert_close(expectation, model[2].weight.detach(), rtol=1e-8, atol=1e-12)


def test_what_the_saliency_draws_is_right_on_average():
    model, data = perceptron(), normal(EXAMPLES, 4)
    first = without(model, [0], data)
    hidden = model[:2](data).detach()
    exact = hidden @ model[2].weight.detach().T
    sums, squares, draws = torch.zeros_like(exact[0]), torch.zeros_like(exact[0]), 300
    for seed in range(draws):
        stay = drawn_units(first, "norm", seed).topk(3).indices
        removal = without(model, [u for u in range(7) if u not in stay], data)
        found = Coreset().compensate(removal)["2.weight"] * removal.changes["2.weight"].keep
        mean = (hidden @ found.T).mean(0)
        sums, squares = sums + mean, squares + mean.square()
    deviation = ((squares - sums.square() / draws) / (draws - 1) / draws).sqrt()
    assert (((sums / draws - exact.mean(0)) / deviation).abs() < 4.5).all()
    assert (deviation > 0).all()


def test_single_weights():
    layer, data = nn.Linear(3, 2, dtype=torch.float64), normal(EXAMPLES, 3).abs()
    one = change("0", layer, torch.ones(2, 3, dtype=torch.bool), data)
    seen = Observation("0.weight", one.weight, layout=one.layout, statistics=one.statistics)
    likely = Drawn(bound="data", examples=EXAMPLES, sampled=False).score(seen, Grid(Element(), one.layout)).exp().flatten().tolist()
    expectation = torch.zeros(2, 3, dtype=torch.float64)
    for stay in itertools.combinations(range(6), 3):
        keep = torch.zeros(6, dtype=torch.bool)
        keep[list(stay)] = True
        removal = Removal({"0.weight": change("0", layer, keep.view(2, 3), data)})
        found = Coreset(bound="data", examples=EXAMPLES).compensate(removal)["0.weight"]
        expectation += probability(likely, stay) * found * keep.view(2, 3)
    torch.testing.assert_close(expectation, layer.weight.detach(), rtol=1e-8, atol=1e-12)


def test_what_does_not_fit_is_told():
    one = change("0", nn.Linear(2, 2), torch.tensor([[True, False], [True, True]]))
    with pytest.raises(InputError, match="bound: norm is of units"):
        Coreset().compensate(Removal({one.name: one}))
    with pytest.raises(InputError, match=r"responses that 0\.weight reads were not collected"):
        Coreset(bound="data").compensate(Removal({one.name: one}))
    assert build("compensation", {"coreset": {"bound": "data"}}) == Coreset(bound="data")
