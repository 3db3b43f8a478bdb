"""SparseGPT against the optimal brain surgeon in its column order, with an inverse of its own at every column."""

import numpy as np
import pytest
import torch

from niwaki.layerwise.counts import equal_shares, lowest, pattern_groups, shares
from niwaki.layerwise.moments import moments
from niwaki.layerwise.sparsegpt import Pattern, sparsegpt


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram_of(columns, groups=1, seed=0):
    """Second moments of correlated data."""
    data = normal(groups, 3 * columns, columns, seed=seed) @ normal(groups, columns, columns, seed=seed + 1)
    return data.mT @ data / (3 * columns)


def surgeon(weight, hessian, choose):
    """Optimal brain surgeon from left to right: each column is removed with those before it held.

    ``choose(scores, begin)`` says which weights of the next columns go; ``scores`` are of all columns from ``begin`` on.
    """
    weight, (rows, columns) = weight.copy(), weight.shape
    go = np.zeros((rows, 0), dtype=bool)
    for j in range(columns):
        if j == go.shape[1]:
            diagonals = np.array([np.linalg.inv(hessian[k:, k:])[0, 0] for k in range(j, columns)])
            go = np.concatenate([go, choose(weight[:, j:] ** 2 / diagonals, j)], axis=1)
        inverse = np.linalg.inv(hessian[j:, j:])
        for r in range(rows):
            if go[r, j]:
                weight[r, j:] -= weight[r, j] / inverse[0, 0] * inverse[:, 0]
    return ~go, np.where(go, 0.0, weight)


def least(scores, count):
    """The lowest scores; numpy's order of equal ones does not matter, as there are none."""
    go = np.zeros(scores.size, dtype=bool)
    go[scores.flatten().argsort()[:count]] = True
    return go.reshape(scores.shape)


@pytest.mark.parametrize("damping", [0.0, 0.01, 0.5])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_one_row_is_the_optimal_brain_surgeon_in_order_of_the_columns(seed, damping):
    weight, gram = normal(1, 1, 9, seed=seed + 10), gram_of(9, seed=seed)
    keep, new = sparsegpt(weight, moments(gram, damping, "w"), torch.ones_like(weight, dtype=torch.bool), 4)
    hessian = gram[0].numpy() + damping * np.diag(gram[0].numpy()).mean() * np.eye(9)
    expected, values = surgeon(weight[0].numpy(), hessian, lambda scores, j: least(scores, 5))
    assert keep[0].tolist() == expected.tolist()
    np.testing.assert_allclose(new[0].numpy(), values, rtol=1e-9, atol=1e-10)
    assert np.abs(values - weight[0].numpy())[expected].max() > 1e-2  # there is an update to be compared


@pytest.mark.parametrize(("block", "mask_block"), [(1, 4), (4, 4), (128, 4), (8, 4), (2, 128), (3, 5)])
def test_masks_of_blocks_are_chosen_over_all_rows_when_they_are_reached(block, mask_block):
    weight, gram, columns = normal(1, 5, 12, seed=3), gram_of(12, seed=4), 12
    begins = range(0, columns, mask_block)
    keep, new = sparsegpt(
        weight, moments(gram, 0.01, "w"), torch.ones_like(weight, dtype=torch.bool), 25, block=block, mask_block=mask_block
    )
    counts = {b: 35 * min(b + mask_block, columns) // columns - 35 * b // columns for b in begins}  # 60 - 25 = 35 go, evenly

    def choose(scores, j):
        return least(scores[:, : min(mask_block, columns - j)], counts[j])

    hessian = gram[0].numpy() + 0.01 * np.diag(gram[0].numpy()).mean() * np.eye(columns)
    expected, values = surgeon(weight[0].numpy(), hessian, choose)
    assert int(keep.sum()) == 25
    assert keep[0].tolist() == expected.tolist()
    np.testing.assert_allclose(new[0].numpy(), values, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("columns", [8, 10])  # a short last group keeps two as well
def test_n_of_m(columns):
    weight, gram = normal(1, 4, columns, seed=5), gram_of(columns, seed=6)
    groups = pattern_groups(columns, 4)
    keep, new = sparsegpt(weight, moments(gram, 0.0, "w"), torch.ones_like(weight, dtype=torch.bool), 0, Pattern(2, groups), block=5)

    def choose(scores, j):
        group = scores[:, : min(4, columns - j)]
        return np.stack([least(row, max(group.shape[1] - 2, 0)) for row in group])

    expected, values = surgeon(weight[0].numpy(), gram[0].numpy(), choose)
    assert keep[0].tolist() == expected.tolist()
    np.testing.assert_allclose(new[0].numpy(), values, rtol=1e-8, atol=1e-9)
    assert keep[0].split(4, dim=1)[-1].sum(dim=1).tolist() == [2] * 4


def test_groups_of_a_pattern_need_not_be_consecutive():
    weight, gram = normal(1, 3, 12, seed=7), gram_of(12, seed=8)
    groups = pattern_groups(6, 3, positions=2)
    order = groups.argsort(stable=True)
    active = torch.ones_like(weight, dtype=torch.bool)
    keep, new = sparsegpt(weight, moments(gram, 0.01, "w"), active, 0, Pattern(1, groups))
    sorted_keep, sorted_new = sparsegpt(
        weight[..., order], moments(gram[:, order][:, :, order], 0.01, "w"), active, 0, Pattern(1, groups[order])
    )
    assert torch.equal(keep[..., order], sorted_keep)
    torch.testing.assert_close(new[..., order], sorted_new, rtol=1e-10, atol=1e-10)
    for group in range(4):
        assert keep[..., groups == group].sum(dim=-1).eq(1).all()


def test_groups_of_a_convolution_have_their_own_moments():
    weight, gram = normal(2, 3, 8, seed=9), gram_of(8, groups=2, seed=10)
    active = torch.ones_like(weight, dtype=torch.bool)
    groups = pattern_groups(8, 4)
    keep, new = sparsegpt(weight, moments(gram, 0.01, "w"), active, 0, Pattern(2, groups))
    for g in range(2):
        alone = sparsegpt(weight[g : g + 1], moments(gram[g : g + 1], 0.01, "w"), active[:1], 0, Pattern(2, groups))
        assert torch.equal(keep[g : g + 1], alone[0])
        torch.testing.assert_close(new[g : g + 1], alone[1], rtol=1e-10, atol=1e-10)


def test_weights_that_went_before_stay_out_and_are_made_up_for():
    weight, gram = normal(1, 6, 10, seed=11), gram_of(10, seed=12)
    active = torch.rand(1, 6, 10, generator=torch.Generator().manual_seed(1)) > 0.4
    weight = weight.masked_fill(~active, 0.0)
    number = int(active.sum())
    keep, new = sparsegpt(weight, moments(gram, 0.0, "w"), active, number - 7, mask_block=4)
    assert int(keep.sum()) == number - 7
    assert not (keep & ~active).any()
    assert not new[~keep].any()
    every = {"mask_block": 10}
    unchanged, same = sparsegpt(weight, moments(gram, 0.0, "w"), active, number, **every)
    assert torch.equal(unchanged, active)
    torch.testing.assert_close(same, weight, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("keep", [0, 1, 13, 30, 59, 60])
@pytest.mark.parametrize("mask_block", [1, 7, 128])
def test_counts_are_exact_also_where_scores_are_equal(keep, mask_block):
    found, _ = sparsegpt(
        torch.ones(1, 5, 12, dtype=torch.float64), moments(torch.eye(12)[None], 0.01, "w"), torch.ones(1, 5, 12).bool(), keep,
        mask_block=mask_block,
    )  # fmt: skip
    assert int(found.sum()) == keep


def test_equal_scores_keep_the_lower_index():
    weight = torch.ones(1, 2, 4, dtype=torch.float64)
    keep, _ = sparsegpt(weight, moments(torch.eye(4)[None], 0.0, "w"), weight.bool(), 5)
    assert keep[0].tolist() == [[True] * 4, [True, False, False, False]]
    keep, _ = sparsegpt(weight, moments(torch.eye(4)[None], 0.0, "w"), weight.bool(), 0, Pattern(2, pattern_groups(4, 4)))
    assert keep[0].tolist() == [[True, True, False, False]] * 2


def test_weights_of_dead_columns_go_first():
    weight, gram = normal(1, 4, 6, seed=13) + 5, gram_of(6, seed=14)
    gram[0, [1, 4]] = gram[0, :, [1, 4]] = 0.0
    active = torch.ones_like(weight, dtype=torch.bool)
    found = moments(gram, 0.01, "w")
    keep, new = sparsegpt(weight, found, active, 16, mask_block=2)
    assert not keep[0, :, [1, 4]].any()
    assert keep[0, :, [0, 2, 3, 5]].all()
    torch.testing.assert_close(new[keep], weight[keep], rtol=1e-12, atol=1e-12)  # nothing was lost
    keep, new = sparsegpt(weight, found, active, 19, mask_block=2)
    assert int(keep[0, :, [1, 4]].sum()) == 3
    torch.testing.assert_close(new[keep], weight[keep], rtol=1e-12, atol=1e-12)
    pattern = Pattern(2, pattern_groups(6, 3))
    keep, _ = sparsegpt(weight, found, active, 0, pattern)
    assert keep[0].tolist() == [[True, False, True, True, False, True]] * 4


def test_shares_are_exact_and_within_their_sizes():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        sizes = torch.randint(0, 9, (5,), generator=generator).tolist()
        total = int(torch.randint(0, sum(sizes) + 1, (), generator=generator))
        parts = shares(total, sizes)
        assert sum(parts) == total
        assert all(0 <= part <= size for part, size in zip(parts, sizes, strict=True))
        assert all(abs(part - total * size / max(sum(sizes), 1)) < 1 for part, size in zip(parts, sizes, strict=True))
        equal = equal_shares(total, torch.tensor(sizes)).tolist()
        assert sum(equal) == total
        assert all(0 <= part <= size for part, size in zip(equal, sizes, strict=True))
        highest = max(equal)
        assert all(part >= highest - 1 or part == size for part, size in zip(equal, sizes, strict=True))
    assert equal_shares(7, torch.tensor([4, 4, 4])).tolist() == [3, 2, 2]


def test_lowest_takes_the_later_of_equal_ones():
    assert lowest(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), 2).tolist() == [[False, False], [True, True]]
    assert not lowest(torch.ones(3), 0).any()
