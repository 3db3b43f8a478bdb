"""Scores that see all members of a dependency group: merging costs against the definition, samples against exact probabilities."""

import itertools

import pytest
import torch

from niwaki.errors import InputError
from niwaki.granularity import Element
from niwaki.layout import Layout
from niwaki.pieces import Grid, Slices
from niwaki.saliency import Coreset, GroupObservation, MergeCost, Observation
from niwaki.statistics import InputResponses


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def member(name, weight, roles, dim, entries, **more):
    """One member of a group; ``entries``: of each unit."""
    shape = tuple(weight.shape)
    places = torch.tensor(entries)
    return Observation(name, weight, layout=Layout(roles, shape), **more), Slices(
        name, shape, shape, dim, torch.arange(len(places)), places
    )


def network(units=5, seed=0, step=0, run=0, responses=None):
    """A linear layer with bias and what reads it twice: a linear layer, and a map of two positions that is flattened."""
    known = {} if responses is None else {InputResponses(examples=128): responses}
    twice = {} if responses is None else {InputResponses(examples=128): responses.repeat(1, 2)}
    here = {"seed": run, "step": step}
    one = [[u] for u in range(units)]
    maker = member("0.weight", normal(units, 3, seed=seed), ("output", "input"), 0, one, **here)
    bias = member("0.bias", normal(units, seed=seed + 1), ("output",), 0, one)
    reads = member("2.weight", normal(4, units, seed=seed + 2), ("output", "input"), 1, one, statistics=known, **here)
    flat = [[u, u + units] for u in range(units)]
    more = member("3.weight", normal(2, 2 * units, seed=seed + 3), ("output", "input"), 1, flat, statistics=twice, **here)
    return GroupObservation(units, [maker], [reads, more], [bias])


@pytest.mark.parametrize("seed", range(0, 40, 4))
def test_units_merge_in_the_order_of_srinivas_and_babu(seed):
    seen = network(seed=seed)
    made = torch.cat([seen.makers[0][0].weight, seen.along[0][0].weight[:, None]], dim=1)
    flat = seen.readers[1][0].weight
    read = torch.cat([seen.readers[0][0].weight.T, flat[:, :5].T, flat[:, 5:].T], dim=1)
    left, order = list(range(5)), []
    while len(left) > 1:
        costs = {(i, j): float(read[j].square().sum() * (made[i] - made[j]).square().sum()) for i, j in itertools.permutations(left, 2)}
        i, j = min(costs, key=costs.__getitem__)
        read[i] += read[j]
        left.remove(j)
        order.append(j)
    found = MergeCost().score_group(seen)
    assert [int(u) for u in found.argsort()] == [*order, *left]
    assert sorted(found.tolist()) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_masked_units_go_first_and_nan_stays():
    seen = network()
    (weights, cut), active = seen.makers[0], torch.ones(5, 3, dtype=torch.bool)
    active[[1, 3]] = False
    masked = Observation("0.weight", weights.weight * active, layout=weights.layout, active=active)
    found = MergeCost().score_group(GroupObservation(5, [(masked, cut)], seen.readers, seen.along))
    assert found[[1, 3]].tolist() == [0.0, 0.0]
    assert sorted(found[[0, 2, 4]].tolist()) == pytest.approx([0.6, 0.8, 1.0])
    weights.weight[2, 1] = torch.nan
    assert MergeCost().score_group(seen).isnan().all()


@pytest.mark.parametrize("component", [MergeCost(), Coreset()], ids=str)
def test_a_tensor_by_itself_is_refused(component):
    layout = Layout(("output", "input"), (2, 2))
    with pytest.raises(InputError, match="granularity channel"):
        component.score(Observation("w", torch.ones(2, 2), layout=layout), Grid(Element(), layout))
    assert component.scored_on == "inputs"


# ------------------------------------------------------------------ coresets


def likely_by_norm(seen):
    bound = seen.makers[0][0].weight.norm(dim=1)
    flat = seen.readers[1][0].weight.abs()
    shares = []
    for read in (seen.readers[0][0].weight.abs(), flat[:, :5] + flat[:, 5:]):
        parts = read * bound
        shares.append((parts / parts.sum(dim=1, keepdim=True)).amax(dim=0))
    likely = torch.maximum(*shares)
    return likely / likely.sum()


def test_probabilities_are_bounded_shares_of_what_is_read():
    seen = network()
    torch.testing.assert_close(Coreset(sampled=False).score_group(seen).exp(), likely_by_norm(seen), rtol=1e-12, atol=0)


def test_probabilities_on_data():
    responses = normal(20, 5, seed=9).abs()
    seen = network(responses=responses)
    flat = seen.readers[1][0].weight.abs()
    likely = torch.zeros(5, dtype=torch.float64)
    for read in (seen.readers[0][0].weight.abs(), flat[:, :5] + flat[:, 5:]):
        for case in responses:
            for row in read:
                parts = row * case
                likely = torch.maximum(likely, parts / parts.sum())
    found = Coreset(bound="data", sampled=False).score_group(seen).exp()
    torch.testing.assert_close(found, likely / likely.sum(), rtol=1e-12, atol=0)


def test_the_best_are_a_sample_without_replacement():
    seen = network()
    likely = likely_by_norm(seen).tolist()
    draws = 1500
    counts = dict.fromkeys(itertools.combinations(range(5), 2), 0)
    for seed in range(draws):
        best = Coreset().score_group(network(run=seed)).topk(2).indices.tolist()
        counts[tuple(sorted(best))] += 1
    expected = {(i, j): likely[i] * likely[j] * (1 / (1 - likely[i]) + 1 / (1 - likely[j])) for i, j in counts}
    assert sum(expected.values()) == pytest.approx(1.0)
    statistic = sum((counts[s] - draws * p) ** 2 / (draws * p) for s, p in expected.items())
    assert statistic < 35  # χ² of 9 degrees of freedom: 35 is exceeded once in 17,000
    assert statistic > 0


def test_samples_depend_on_seed_and_step_alone():
    one, again = Coreset().score_group(network(run=3, step=7)), Coreset().score_group(network(run=3, step=7))
    assert torch.equal(one, again)
    for other in (network(run=4, step=7), network(run=3, step=8)):
        assert not torch.equal(Coreset().score_group(other), one)


def test_single_weights_by_their_part_in_the_sum_of_their_neuron():
    weight, responses = normal(3, 4), normal(10, 4, seed=1).abs()
    layout = Layout(("output", "input"), (3, 4))
    seen = Observation("w", weight, layout=layout, statistics={InputResponses(examples=128): responses})
    found = Coreset(bound="data", sampled=False).score(seen, Grid(Element(), layout)).exp()
    expected = torch.zeros(3, 4, dtype=torch.float64)
    for case in responses:
        parts = weight.abs() * case
        expected = torch.maximum(expected, parts / parts.sum(dim=1, keepdim=True))
    torch.testing.assert_close(found, expected / expected.sum(), rtol=1e-12, atol=0)


def test_weights_of_grouped_convolutions_and_their_kernels():
    weight, responses = normal(2, 2, 2, 3), normal(6, 4, seed=1).abs()  # groups, outputs, inputs, kernel
    layout = Layout(("group", "output", "input", "kernel"), (2, 2, 2, 3))
    seen = Observation("w", weight, layout=layout, statistics={InputResponses(examples=128): responses})
    found = Coreset(bound="data", sampled=False).score(seen, Grid(Element(), layout)).exp()
    expected = torch.zeros_like(weight)
    for case in responses:
        parts = weight.abs() * case.view(2, 1, 2, 1)
        expected = torch.maximum(expected, parts / parts.sum(dim=(2, 3), keepdim=True))
    torch.testing.assert_close(found, expected / expected.sum(), rtol=1e-12, atol=0)
