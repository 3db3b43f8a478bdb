"""The exact greedy surgeon against refits of every possible next removal by least squares on the data themselves."""

import numpy as np
import pytest
import torch

from niwaki.layerwise import exact as module
from niwaki.layerwise.counts import pattern_groups
from niwaki.layerwise.exact import exact
from niwaki.layerwise.moments import moments
from niwaki.layerwise.sparsegpt import Pattern


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def data_of(columns, seed=0):
    return normal(3 * columns, columns, seed=seed) @ normal(columns, columns, seed=seed + 1)


def best(data, row, support):
    """The least mean squared change of the output with only some weights, and these weights."""
    weights = np.zeros_like(row)
    if support:
        weights[support] = np.linalg.lstsq(data[:, support], data @ row, rcond=None)[0]
    return float(((data @ (weights - row)) ** 2).mean()), weights


def greedy(data, row, support, allowed):
    """Which weight goes next, and what it costs beyond what is lost already."""
    now = best(data, row, support)[0]
    costs = {q: best(data, row, [s for s in support if s != q])[0] - now for q in support if allowed(q, support)}
    goes = min(costs, key=costs.__getitem__) if costs else None
    return goes, costs.get(goes, np.inf)


def by_force(data, weight, go, supports=None):
    """Remove ``go`` weights, each the one of all rows that is next in its row and costs least."""
    supports = [list(range(weight.shape[1])) for _ in weight] if supports is None else supports
    following = [greedy(data, row, s, lambda q, s: True) for row, s in zip(weight, supports, strict=True)]
    for _ in range(go):
        r = min(range(len(weight)), key=lambda r: following[r][1])
        supports[r].remove(following[r][0])
        following[r] = greedy(data, weight[r], supports[r], lambda q, s: True)
    return supports, np.stack([best(data, row, s)[1] for row, s in zip(weight, supports, strict=True)])


def check(found, supports, values):
    keep, new = found
    assert [row.nonzero().flatten().tolist() for row in keep[0]] == [sorted(s) for s in supports]
    np.testing.assert_allclose(new[0].numpy(), values, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("panel", [1, 3, 48])
@pytest.mark.parametrize("memory", [1, 1 << 27])  # one row at a time, or all
def test_weights_go_in_the_order_of_their_cost_over_all_rows(seed, panel, memory, monkeypatch):
    monkeypatch.setattr(module, "PANEL", panel)
    monkeypatch.setattr(module, "MEMORY", memory)
    data, weight = data_of(8, seed=seed), normal(1, 4, 8, seed=seed + 20)
    weight[0, 2] *= 5  # rows differ in what they lose
    found = exact(weight, moments((data.T @ data / len(data))[None], 0.0, "w"), torch.ones(1, 4, 8).bool(), 15)
    supports, values = by_force(data.numpy(), weight[0].numpy(), 17)
    assert len({len(s) for s in supports}) > 1
    check(found, supports, values)


def test_the_same_number_of_each_row():
    data, weight = data_of(7, seed=4), normal(1, 3, 7, seed=5)
    weight[0, 2] *= 5
    found = exact(weight, moments((data.T @ data / len(data))[None], 0.0, "w"), torch.ones(1, 3, 7).bool(), 10, per="row")
    alone = [by_force(data.numpy(), row[None].numpy(), go) for row, go in zip(weight[0], (3, 4, 4), strict=True)]
    check(found, [supports[0] for supports, _ in alone], np.concatenate([values for _, values in alone]))


@pytest.mark.parametrize("columns", [8, 7])
def test_n_of_m(columns):
    data, weight = data_of(columns, seed=6), normal(1, 3, columns, seed=7)
    groups = pattern_groups(columns, 4)
    pattern = Pattern(2, groups)
    found = exact(weight, moments((data.T @ data / len(data))[None], 0.0, "w"), torch.ones(1, 3, columns).bool(), 0, pattern)
    supports = []
    for row in weight[0].numpy():
        support = list(range(columns))
        while (goes := greedy(data.numpy(), row, support, lambda q, s: sum(i // 4 == q // 4 for i in s) > 2)[0]) is not None:
            support.remove(goes)
        supports.append(support)
    check(found, supports, np.stack([best(data.numpy(), row, s)[1] for row, s in zip(weight[0].numpy(), supports, strict=True)]))
    assert all(len(s) == 4 for s in supports)


def test_weights_that_went_before_stay_out():
    data, weight = data_of(8, seed=8), normal(1, 4, 8, seed=9)
    active = torch.rand(1, 4, 8, generator=torch.Generator().manual_seed(3)) > 0.3
    weight = weight.masked_fill(~active, 0.0)
    go = 9
    found = exact(weight, moments((data.T @ data / len(data))[None], 0.0, "w"), active, int(active.sum()) - go)
    supports = [row.nonzero().flatten().tolist() for row in active[0]]
    check(found, *by_force(data.numpy(), weight[0].numpy(), go, supports))


def test_matrices_that_shrink_as_weights_go_change_nothing(monkeypatch):
    data, weight = data_of(40, seed=10), normal(1, 6, 40, seed=11)
    arguments = (weight, moments((data.T @ data / len(data))[None], 0.0, "w"), torch.ones(1, 6, 40).bool(), 60)
    monkeypatch.setattr(module, "PANEL", 4)
    shrinking = exact(*arguments)
    monkeypatch.setattr(module, "COMPACT", -1.0)
    whole = exact(*arguments)
    assert torch.equal(shrinking[0], whole[0])
    torch.testing.assert_close(shrinking[1], whole[1], rtol=1e-8, atol=1e-8)


def test_weights_are_the_least_squares_of_their_support():
    data, weight = data_of(40, seed=12), normal(1, 6, 40, seed=13)
    keep, new = exact(weight, moments((data.T @ data / len(data))[None], 0.0, "w"), torch.ones(1, 6, 40).bool(), 90)
    assert int(keep.sum()) == 90
    for row, stays, found in zip(weight[0], keep[0], new[0], strict=True):
        expected = best(data.numpy(), row.numpy(), stays.nonzero().flatten().tolist())[1]
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-7)


def test_groups_have_their_own_moments_and_one_budget():
    data = torch.stack([data_of(6, seed=14), 3 * data_of(6, seed=15)])
    weight = normal(2, 2, 6, seed=16)
    grams = data.mT @ data / data.shape[1]
    keep, new = exact(weight, moments(grams, 0.0, "w"), torch.ones(2, 2, 6).bool(), 11)
    counts = keep.sum(dim=(1, 2)).tolist()
    assert sum(counts) == 11
    assert counts[1] > counts[0]  # what reads larger inputs loses less
    for g in range(2):
        alone = exact(weight[g : g + 1], moments(grams[g : g + 1], 0.0, "w"), torch.ones(1, 2, 6).bool(), counts[g])
        assert torch.equal(keep[g], alone[0][0])
        torch.testing.assert_close(new[g], alone[1][0])


def test_equal_costs_keep_the_lower_index():
    weight = torch.ones(1, 3, 4, dtype=torch.float64)
    keep, _ = exact(weight, moments(torch.eye(4)[None], 0.0, "w"), weight.bool(), 7)
    assert keep[0].tolist() == [[True] * 4, [True, True, True, False], [False] * 4]
    keep, _ = exact(weight, moments(torch.eye(4)[None], 0.0, "w"), weight.bool(), 0, Pattern(2, pattern_groups(4, 4)))
    assert keep[0].tolist() == [[True, True, False, False]] * 3


def test_dead_columns_go_first_and_cost_nothing():
    data, weight = data_of(6, seed=17), normal(1, 3, 6, seed=18) + 4
    data[:, [0, 3]] = 0.0
    found = moments((data.T @ data / len(data))[None], 0.0, "w")
    keep, new = exact(weight, found, torch.ones(1, 3, 6).bool(), 12)
    assert not keep[0, :, [0, 3]].any()
    torch.testing.assert_close(new[keep], weight[keep])
    keep, new = exact(weight, found, torch.ones(1, 3, 6).bool(), 14)
    assert int(keep[0, :, [0, 3]].sum()) == 2
    torch.testing.assert_close(new[keep], weight[keep])


@pytest.mark.parametrize("keep", [0, 1, 18])
def test_extreme_counts(keep):
    weight, data = normal(1, 3, 6, seed=19), data_of(6, seed=20)
    found, new = exact(weight, moments((data.T @ data / len(data))[None], 0.0, "w"), torch.ones(1, 3, 6).bool(), keep)
    assert int(found.sum()) == keep
    assert not new[~found].any()
