"""Orders in which units are removed, against the same greedy rules on the data themselves, and the lasso against coordinate descent."""

import numpy as np
import pytest
import torch

from niwaki.layerwise.channels import contributions, dependence_order, lasso_path, thinet_order
from niwaki.layerwise.moments import moments


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def outputs_of(data, weight, columns):
    """What each unit adds to the outputs: [units, observations, rows]."""
    return torch.stack([data[:, c] @ weight[:, c].T for c in columns])


UNITS = [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]


def test_contributions_are_moments_of_what_units_add_to_the_outputs():
    data, weight = normal(30, 11), normal(4, 11, seed=1)
    unit = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 4, 4, -1])
    parts = outputs_of(data, weight, UNITS)
    expected = torch.einsum("uno,vno->uv", parts, parts) / 30
    found = contributions(weight[None], (data.T @ data / 30)[None], unit[None], 5)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_contributions_of_groups_meet_only_where_a_unit_is_in_both():
    data, weight = normal(2, 30, 3), normal(2, 4, 3, seed=1)
    unit = torch.tensor([[0, 1, 2], [2, 3, 0]])
    parts = torch.zeros(4, 30, 8, dtype=torch.float64)
    for g in range(2):
        for c in range(3):
            parts[unit[g, c], :, 4 * g : 4 * g + 4] += data[g, :, c, None] * weight[g, :, c]
    expected = torch.einsum("uno,vno->uv", parts, parts) / 30
    torch.testing.assert_close(contributions(weight, data.mT @ data / 30, unit, 4), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_thinet_removes_what_leaves_the_least_sum(seed):
    data, weight = normal(30, 10, seed=seed) @ normal(10, 10, seed=seed + 50), normal(4, 10, seed=seed + 1)
    parts = outputs_of(data, weight, UNITS)
    removed, left = [], list(range(5))
    while left:
        goes = min(left, key=lambda u: float(parts[[*removed, u]].sum(dim=0).square().sum()))
        removed.append(goes)
        left.remove(goes)
    products = torch.einsum("uno,vno->uv", parts, parts)
    order = thinet_order(products, torch.ones(5, dtype=torch.bool))
    assert order.argsort().tolist() == removed


def test_units_that_are_gone_come_first_and_ties_keep_the_lower():
    gone = torch.tensor([True, False, True, True])
    assert thinet_order(torch.eye(4), gone).tolist() == [3, 0, 2, 1]
    products = torch.tensor([[4.0, 0.0, -8.0], [0.0, 0.0, 0.0], [-8.0, 0.0, 4.0]])
    assert thinet_order(products, torch.tensor([True, False, True])).tolist() == [2, 0, 1]


def coordinate_descent(products, penalty, start):
    target, beta = products.sum(axis=1), start.copy()
    for _ in range(20000):
        before = beta.copy()
        for j in range(len(beta)):
            force = target[j] - products[j] @ beta + products[j, j] * beta[j]
            beta[j] = np.sign(force) * max(abs(force) - penalty, 0) / products[j, j]
        if np.abs(beta - before).max() < 1e-13:
            return beta
    raise AssertionError("no solution yet")


def correlated(seed, units=6):
    """Contributions that partly cancel, well enough conditioned for coordinate descent."""
    parts = normal(40, units, seed=seed) + 1.5 * normal(40, 1, seed=seed + 90) * torch.tensor([1.0, -1.0] * (units // 2))
    return (parts * torch.linspace(0.3, 3, units)).T @ (parts * torch.linspace(0.3, 3, units)) / 40


@pytest.mark.parametrize("seed", range(8))
def test_lasso_path_is_the_largest_penalty_at_which_a_unit_is_in(seed):
    products = correlated(seed)
    path = lasso_path(products).numpy()
    penalties = np.concatenate([np.geomspace(1.5 * path.max(), 1e-4 * path.max(), 60), path * (1 - 1e-4), path * (1 + 1e-4)])
    beta = np.zeros(len(path))
    for penalty in sorted(penalties, reverse=True):
        beta = coordinate_descent(products.numpy(), penalty, beta)
        inside = np.abs(beta) > 1e-9
        assert not (inside & (penalty > path * (1 + 1e-9))).any()
        just = np.isclose(penalty, path * (1 - 1e-4), rtol=1e-12)
        assert inside[just].all()


@pytest.mark.parametrize(("units", "seed"), [(8, 237), (6, 167), (8, 66)])  # rare: found by trying
def test_lasso_path_follows_units_that_leave_again(units, seed):
    parts = normal(units + 4, units, seed=seed)
    products = parts.T @ parts / (units + 4)
    path = lasso_path(products).numpy()
    beta, was, leaves = np.zeros(units), np.zeros(units, dtype=bool), 0
    for penalty in np.geomspace(path.max() * 0.999, 1e-4 * path.max(), 150):
        beta = coordinate_descent(products.numpy(), penalty, beta)
        inside = np.abs(beta) > 1e-9
        leaves += int((was & ~inside).sum())
        first = inside & ~was
        assert (penalty <= path[first]).all()
        assert (path[first] <= penalty * 1.07).all()  # it came in since the penalty before
        was |= inside
    assert leaves > 0
    assert was.all()


def test_lasso_leaves_out_what_adds_nothing():
    products = torch.zeros(4, 4, dtype=torch.float64)
    products[:3, :3] = torch.tensor([[2.0, 2.0, 0.0], [2.0, 2.0, 0.0], [0.0, 0.0, 1.0]])  # the second is the first again
    assert lasso_path(products).tolist() == [4.0, 0.0, 1.0, 0.0]
    assert lasso_path(torch.zeros(3, 3)).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("width", [1, 2])
def test_linear_dependence_removes_what_the_others_can_do(seed, width):
    data, weight = normal(40, 10, seed=seed) @ normal(10, 10, seed=seed + 50), normal(4, 10, seed=seed + 1)
    units = [list(range(u, u + width)) for u in range(0, 10, width)]
    target, left, removed = (data @ weight.T).numpy(), list(range(len(units))), []

    def error(stays):
        at = [c for u in stays for c in units[u]]
        fit = np.linalg.lstsq(data[:, at].numpy(), target, rcond=None)[0] if at else None
        return float(((target - (data[:, at].numpy() @ fit if at else 0)) ** 2).sum())

    while left:
        goes = min(left, key=lambda u: error([v for v in left if v != u]))
        removed.append(goes)
        left.remove(goes)
    gram = (data.T @ data / 40)[None]
    order = dependence_order(weight[None], moments(gram, 0.0, "w"), torch.tensor(units), torch.ones(len(units), dtype=torch.bool))
    assert order.argsort().tolist() == removed


def test_a_unit_that_is_a_sum_of_others_goes_first():
    data, weight = normal(40, 5), normal(3, 5, seed=1)
    data[:, 2] = 2 * data[:, 0] - data[:, 4] + 1e-4 * data[:, 2]
    weight[:, 2] *= 100  # neither small nor without effect
    order = dependence_order(
        weight[None], moments((data.T @ data / 40)[None], 0.0, "w"), torch.arange(5)[:, None], torch.ones(5, dtype=torch.bool)
    )
    assert order.tolist().index(0) in (0, 2, 4)
    gone = torch.tensor([True, True, True, False, True])
    assert dependence_order(weight[None], moments((data.T @ data / 40)[None], 0.0, "w"), torch.arange(5)[:, None], gone)[3] == 0


def test_linear_dependence_in_groups_looks_at_each_by_itself():
    data, weight = normal(2, 40, 3) @ normal(2, 3, 3, seed=3), normal(2, 2, 3, seed=1)
    columns = torch.tensor([[3], [0], [5], [1], [2], [4]])  # of units, in any order
    grams = data.mT @ data / 40
    order = dependence_order(weight, moments(grams, 0.0, "w"), columns, torch.ones(6, dtype=torch.bool))
    for g in range(2):
        of = [u for u in range(6) if int(columns[u]) // 3 == g]
        alone = dependence_order(weight[g : g + 1], moments(grams[g : g + 1], 0.0, "w"), columns[of] % 3, torch.ones(3, dtype=torch.bool))
        assert order[of].argsort().tolist() == alone.argsort().tolist()
